package image

import (
	"strings"

	"github.com/sluice-edge/sluice/internal/errs"
)

// DefaultTag is the tag of a name that has none.
const DefaultTag = "default"

// maxNameDir leaves room in the name of a directory, which holds 255 bytes, for what makes it one of a build.
const maxNameDir = 200

// Name is the parsed form of [namespace/]alias[:tag], in lower case.
type Name struct {
	Namespace string // may be empty
	Alias     string
	Tag       string
}

// ParseName reads a template's name as clients and operators write it.
func ParseName(reference string) (Name, error) {
	invalid := errs.New(errs.Invalid, "invalid template name %q: want [namespace/]alias[:tag] of letters, digits, '-', '_' and '.', "+
		"none with a dot in front, at most 128 each and 200 in all", clip(reference))
	if len(reference) > 256 {
		return Name{}, invalid
	}
	rest, tag, tagged := strings.Cut(strings.ToLower(reference), ":")
	if !tagged {
		tag = DefaultTag
	}
	namespace, alias, spaced := strings.Cut(rest, "/")
	if !spaced {
		namespace, alias = "", rest
	}
	for _, part := range []string{namespace, alias, tag} {
		if part == "" && (part != namespace || spaced || alias == "" || tag == "") {
			return Name{}, invalid
		}
		if strings.HasPrefix(part, ".") || strings.ContainsFunc(part, notInName) || len(part) > 128 {
			return Name{}, invalid
		}
	}
	n := Name{namespace, alias, tag}
	if len(n.dir()) > maxNameDir {
		return Name{}, invalid
	}
	return n, nil
}

func notInName(r rune) bool {
	return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_' && r != '.'
}

// Base is the name without its tag.
func (n Name) Base() string {
	if n.Namespace == "" {
		return n.Alias
	}
	return n.Namespace + "/" + n.Alias
}

// String is the shortest way to write the name.
func (n Name) String() string {
	if n.Tag == DefaultTag {
		return n.Base()
	}
	return n.Base() + ":" + n.Tag
}

// dir is the name's directory. '+' is in no name, so "a/b" is never confused with tag b of a.
func (n Name) dir() string { return strings.Replace(n.Base(), "/", "+", 1) }

// nameOfDir undoes dir.
func nameOfDir(dir, tag string) (Name, error) {
	n, err := ParseName(strings.Replace(dir, "+", "/", 1) + ":" + tag)
	if err == nil && (n.dir() != dir || n.Tag != tag) {
		err = errs.New(errs.Invalid, "%q is not the directory of a template", clip(dir))
	}
	return n, err
}
