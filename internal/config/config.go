// Package config reads the settings of a binary: flags first, the environment as fallback, the default beside each flag.
// The setting `-link-listen` is SLUICE_LINK_LISTEN in the environment. What a setting means is the binary's business.
package config

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
)

// ErrHelp is returned when the user asked for the list of settings; it has been printed.
var ErrHelp = flag.ErrHelp

// Parse fills the flags of fs from args, and those that args leave out from the environment. It refuses words that no flag
// takes. Usage goes to out, and only when asked for.
func Parse(fs *flag.FlagSet, args []string, getenv func(string) string, out io.Writer) error {
	Usage(fs, "[flags]")
	words, err := ParseWords(fs, args, 0, getenv, out)
	if err == nil && len(words) > 0 {
		err = fmt.Errorf("%s: %q is no flag (see %s -h)", fs.Name(), words[0], fs.Name())
	}
	return err
}

// Usage makes help of fs begin with what it takes.
func Usage(fs *flag.FlagSet, takes string) {
	fs.Usage = func() {
		fmt.Fprintf(fs.Output(), "usage: %s %s\n", fs.Name(), takes)
		fs.PrintDefaults()
	}
}

// ParseWords is Parse for a command that takes words too, which may stand before, between and after its flags. What follows the first
// most of them, and the flags right behind, is returned as it is: it may be another command with flags of its own.
func ParseWords(fs *flag.FlagSet, args []string, most int, getenv func(string) string, out io.Writer) (words []string, err error) {
	fs.SetOutput(io.Discard)
	usage := fs.Usage
	fs.Usage = func() {}
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				fs.SetOutput(out)
				usage()
				return nil, ErrHelp
			}
			return nil, fmt.Errorf("%s: %w (see %s -h)", fs.Name(), err, fs.Name())
		}
		args = fs.Args()
		if len(args) == 0 || len(words) >= most {
			break
		}
		words, args = append(words, args[0]), args[1:]
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	fs.VisitAll(func(f *flag.Flag) {
		if value := getenv(EnvName(f.Name)); value != "" && !given[f.Name] {
			if err := fs.Set(f.Name, value); err != nil {
				errs = append(errs, fmt.Errorf("environment %s: %w", EnvName(f.Name), err))
			}
		}
	})
	return append(words, args...), errors.Join(errs...)
}

// EnvName is the environment's name for a flag.
func EnvName(flagName string) string {
	return "SLUICE_" + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

// List is a flag value of comma-separated words; repeating the flag adds to it.
type List []string

// String implements flag.Value.
func (l *List) String() string { return strings.Join(*l, ",") }

// Set implements flag.Value. The first Set replaces nothing: start with an empty List and put a default in Validate.
func (l *List) Set(s string) error {
	for word := range strings.SplitSeq(s, ",") {
		if word = strings.TrimSpace(word); word != "" {
			*l = append(*l, word)
		}
	}
	return nil
}
