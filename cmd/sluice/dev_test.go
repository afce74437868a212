package main

import (
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/devstack"
)

// What the greeting prints can be pasted whole: each line is a comment or a command.
func TestGreetingCanBePasted(t *testing.T) {
	var out strings.Builder
	greet(&out, &devstack.Stack{
		HTTPAddr:    &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8080},
		HTTPSAddr:   &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 8443},
		Domain:      "sluice.localhost:8443",
		APIKey:      "e2b_" + strings.Repeat("0", 40),
		CAFile:      "/home/me/a dir/ca.pem",
		Machine:     "sandboxes are namespaces, because\nof something",
		Limitations: []string{"something is not limited"},
	}, "sluice.localhost")
	for line := range strings.Lines(out.String()) {
		line = strings.TrimSpace(line)
		if line != "" && line[0] != '#' && !strings.HasPrefix(line, "export ") && !strings.HasPrefix(line, "curl ") {
			t.Errorf("line %q is neither a comment nor a command", line)
		}
	}
	for _, want := range []string{
		"export E2B_API_KEY=e2b_", "export E2B_API_URL=http://127.0.0.1:8080\n", "export E2B_SANDBOX_URL=http://127.0.0.1:8080\n",
		"export E2B_DOMAIN=sluice.localhost:8443\n", "NODE_EXTRA_CA_CERTS='/home/me/a dir/ca.pem'\n", "# note: something is not limited\n",
		"# sandboxes are namespaces, because of something\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the greeting lacks %q:\n%s", want, out.String())
		}
	}
	// As the shell sees it, with the lines of the https way uncommented.
	script := strings.ReplaceAll(out.String(), "\n#   ", "\n")
	if text, err := exec.Command("sh", "-n", "-c", script).CombinedOutput(); err != nil {
		t.Errorf("the shell cannot read the greeting: %v\n%s", err, text)
	}
}

func TestDispatchNamesAnUnknownCommand(t *testing.T) {
	err := dispatch(t.Context(), []string{"launch"})
	if err == nil || !strings.Contains(err.Error(), `"launch"`) {
		t.Errorf("dispatch(launch) = %v, want an error with the word", err)
	}
}

func TestDevDefaultsFollowXDG(t *testing.T) {
	cfg, err := parseDevConfig(nil, func(name string) string { return map[string]string{"XDG_STATE_HOME": "/x"}[name] })
	if err != nil || cfg.stack.StateDir != "/x/sluice" || cfg.stack.HTTPListen != "127.0.0.1:8080" || cfg.stack.HTTPSListen != "127.0.0.1:8443" || cfg.stack.Domain != "sluice.localhost" {
		t.Errorf("defaults = %+v, %v", cfg, err)
	}
}
