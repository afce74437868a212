package main

import (
	"strings"
	"testing"
)

func TestConfigNamesEveryMistakeAtOnce(t *testing.T) {
	none := func(string) string { return "" }
	_, err := parseConfig([]string{"-node-id", "", "-max-sandboxes", "-1", "-team-sandboxes", "-2", "-team-paused", "-3", "-team-snapshots", "-4", "-api-advertise", ":5008"}, none)
	for _, part := range []string{"-node-id", "-domain", "-cluster-key-file", "-max-sandboxes", "-team-sandboxes", "-team-paused", "-team-snapshots", "-link-advertise", "-api-advertise"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("parseConfig() = %v, want %q in it", err, part)
		}
	}
	good := []string{"-node-id", "n", "-domain", "a.b:8443", "-cluster-key-file", "k", "-link-advertise", "10.0.0.1:5007", "-api-advertise", "n1.local:5008"}
	if _, err := parseConfig(good, none); err != nil {
		t.Errorf("parseConfig(%q) = %v", good, err)
	}
}
