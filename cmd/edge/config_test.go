package main

import (
	"strings"
	"testing"
)

func TestConfigNamesEveryMistakeAtOnce(t *testing.T) {
	none := func(string) string { return "" }
	tests := []struct {
		args []string
		want []string // parts of the error; none means no error
	}{
		{nil, []string{"-domain", "-cluster-key-file", "-cert"}},
		{[]string{"-domain", "a.b", "-cluster-key-file", "k", "-https-listen", ""}, []string{"nothing to serve"}},
		{[]string{"-domain", "a.b", "-cluster-key-file", "k", "-cert", "c"}, []string{"go together"}},
		{[]string{"-domain", "a.b", "-cluster-key-file", "k", "-cert", "c", "-key", "k", "-dev-ca-dir", "d"}, []string{"either"}},
		{[]string{"-domain", "a.b", "-cluster-key-file", "k", "-dev-ca-dir", "d"}, nil},
		{[]string{"-domain", "a.b", "-cluster-key-file", "k", "-https-listen", "", "-http-listen", ":80"}, nil},
	}
	for _, tt := range tests {
		_, err := parseConfig(tt.args, none)
		if len(tt.want) == 0 && err != nil {
			t.Errorf("parseConfig(%q) = %v, want no error", tt.args, err)
		}
		for _, part := range tt.want {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("parseConfig(%q) = %v, want %q in it", tt.args, err, part)
			}
		}
	}
}
