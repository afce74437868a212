//go:build !linux

package egress

import "errors"

var errNotLinux = errors.New("egress rules need Linux")

// Apply fails: there is no such kernel here.
func Apply(string, Ruleset) error { return errNotLinux }

// Counters fails like Apply.
func Counters(string) (Refusals, error) { return Refusals{}, errNotLinux }
