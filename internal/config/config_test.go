package config

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	env := map[string]string{"SLUICE_LINK_LISTEN": ":7000", "SLUICE_LEASE": "3s", "SLUICE_BAD": "x"}
	type values struct {
		listen string
		lease  time.Duration
		list   List
	}
	tests := []struct {
		name string
		args []string
		want values
		err  string
	}{
		{"environment is the fallback", nil, values{":7000", 3 * time.Second, nil}, ""},
		{"a flag wins", []string{"-link-listen", ":1"}, values{":1", 3 * time.Second, nil}, ""},
		{"a list splits and adds", []string{"-domain", "a.b, c.d", "-domain", "e.f"}, values{":7000", 3 * time.Second, List{"a.b", "c.d", "e.f"}}, ""},
		{"unknown flag", []string{"-nope"}, values{}, "-nope"},
		{"stray word", []string{"run"}, values{}, `"run" is no flag`},
		{"bad value", []string{"-lease", "soon"}, values{}, "lease"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got values
			fs := flag.NewFlagSet("edge", flag.ContinueOnError)
			fs.StringVar(&got.listen, "link-listen", ":5007", "")
			fs.DurationVar(&got.lease, "lease", time.Second, "")
			fs.Var(&got.list, "domain", "")
			err := Parse(fs, tt.args, func(k string) string { return env[k] }, &strings.Builder{})
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("Parse(%q) = %v, want an error with %q", tt.args, err, tt.err)
				}
				return
			}
			if err != nil || got.listen != tt.want.listen || got.lease != tt.want.lease || !slices.Equal(got.list, tt.want.list) {
				t.Errorf("Parse(%q) = %+v, %v, want %+v", tt.args, got, err, tt.want)
			}
		})
	}
}

func TestParseNamesTheVariable(t *testing.T) {
	fs := flag.NewFlagSet("edge", flag.ContinueOnError)
	fs.Int("bad", 1, "")
	err := Parse(fs, nil, func(string) string { return "x" }, &strings.Builder{})
	if err == nil || !strings.Contains(err.Error(), "SLUICE_BAD") {
		t.Errorf("Parse() = %v, want the variable's name", err)
	}
}

func TestParseHelpPrintsTheFlags(t *testing.T) {
	fs := flag.NewFlagSet("edge", flag.ContinueOnError)
	fs.Int("workers", 1, "how many")
	var out strings.Builder
	if err := Parse(fs, []string{"-h"}, func(string) string { return "" }, &out); !errors.Is(err, ErrHelp) {
		t.Fatalf("Parse(-h) = %v, want ErrHelp", err)
	}
	if !strings.HasPrefix(out.String(), "usage: edge [flags]\n") || !strings.Contains(out.String(), "-workers") {
		t.Errorf("help = %q, want the usage and the flags", out.String())
	}
}

func TestParseWords(t *testing.T) {
	for _, tt := range []struct {
		args  string
		most  int
		words string
		given string // the flags' values afterwards
		err   string
	}{
		{"id", 1, "id", "0 false", ""},
		{"-n 3 id -f", 1, "id", "3 true", ""},
		{"id -f -n 3", 1, "id", "3 true", ""},
		{"id -f -- ls -n 5", 1, "id ls -n 5", "0 true", ""},
		{"id ls -f", 1, "id ls -f", "0 false", ""},
		{"-- id -f", 1, "id", "0 true", ""},
		{"a -f b -n 2 c", 9, "a b c", "2 true", ""},
		{"", 9, "", "0 false", ""},
		{"id -nope", 1, "", "0 false", "-nope"},
		{"id -nope", 0, "id -nope", "0 false", ""},
	} {
		fs := flag.NewFlagSet("logs", flag.ContinueOnError)
		n, f := fs.Int("n", 0, ""), fs.Bool("f", false, "")
		words, err := ParseWords(fs, strings.Fields(tt.args), tt.most, func(string) string { return "" }, &strings.Builder{})
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("ParseWords(%q) = %v, want an error with %q", tt.args, err, tt.err)
			}
			continue
		}
		if got := fmt.Sprint(*n, *f); err != nil || strings.Join(words, " ") != tt.words || got != tt.given {
			t.Errorf("ParseWords(%q) = %q, %v with flags %s, want %q with %s", tt.args, words, err, got, tt.words, tt.given)
		}
	}
}
