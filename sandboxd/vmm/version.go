package vmm

import (
	"fmt"
	"regexp"
	"strconv"

	"github.com/sluice-edge/sluice/internal/errs"
)

// Version of the hypervisor. Its minor and patch numbers matter to nobody yet.
type Version struct{ Major, Minor, Patch int }

// MinVersion is the oldest hypervisor that we trust. v52 resets vsock connections on restore, restores the clock before the processors
// run, writes sparse snapshots, and closes CVE-2026-45782.
var MinVersion = Version{Major: 52}

// String is the version as its own program writes it.
func (v Version) String() string { return fmt.Sprintf("v%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Less compares by number.
func (v Version) Less(o Version) bool {
	if v.Major != o.Major {
		return v.Major < o.Major
	}
	if v.Minor != o.Minor {
		return v.Minor < o.Minor
	}
	return v.Patch < o.Patch
}

// Builds say v53.0.0, v53.0, v53.0-15-gabcdef0, or v53.0-dirty.
var versionPattern = regexp.MustCompile(`^cloud-hypervisor v(\d{1,5})\.(\d{1,5})(?:\.(\d{1,5}))?(?:-[^\s]*)?\s`)

// ParseVersion reads what `cloud-hypervisor --version` prints.
func ParseVersion(text string) (Version, error) {
	m := versionPattern.FindStringSubmatch(text + "\n")
	if m == nil {
		return Version{}, errs.New(errs.Unavailable, "%q is not a version of cloud-hypervisor", clip(text))
	}
	var v Version
	for i, p := range []*int{&v.Major, &v.Minor, &v.Patch} {
		if m[i+1] != "" {
			*p, _ = strconv.Atoi(m[i+1]) // five digits at most
		}
	}
	return v, nil
}
