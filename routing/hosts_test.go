package routing

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/sluice-edge/sluice/internal/errs"
)

func newHosts(t testing.TB) *Hosts {
	t.Helper()
	hosts, err := NewHosts("Example.dev", "sbx.other.test.", "e2b-x.app", "localhost")
	if err != nil {
		t.Fatal(err)
	}
	return hosts
}

func TestParse(t *testing.T) {
	const (
		badHost = "Invalid host"
		badID   = "Invalid sandbox ID"
		badPort = "Invalid sandbox port"
	)
	long := strings.Repeat("a", maxSandboxID)
	tests := []struct {
		host string
		want string // "<port>-<id>", "headers", "api", or the text of the error
	}{
		// The plain form, on each domain, with what may stand around it.
		{"3000-iabc.example.dev", "3000-iabc"},
		{"3000-iabc.sbx.other.test", "3000-iabc"},
		{"3000-iabc.e2b-x.app", "3000-iabc"},
		{"3000-iabc.localhost", "3000-iabc"},
		{"3000-iabc.example.dev:8443", "3000-iabc"},
		{"3000-iabc.example.dev.", "3000-iabc"},
		{"3000-iabc.example.dev.:443", "3000-iabc"},
		{"3000-IaBC.eXample.DEV", "3000-iabc"},
		{"1-0.example.dev", "1-0"},
		{"65535-" + long + ".example.dev", "65535-" + long},
		// What follows the id is the constant client id of old SDKs.
		{"49983-iabc-6532622b.example.dev", "49983-iabc"},
		{"49983-iabc-6532622B-x--.example.dev", "49983-iabc"},
		{"49983-iabc-.example.dev", "49983-iabc"},
		{"49983-iabc-_.example.dev", "49983-iabc"},
		// Ports.
		{"0-iabc.example.dev", badPort},
		{"00-iabc.example.dev", badPort},
		{"03000-iabc.example.dev", badPort},
		{"65536-iabc.example.dev", badPort},
		{"99999-iabc.example.dev", badPort},
		{"100000-iabc.example.dev", badPort},
		{"18446744073709551617-iabc.example.dev", badPort},
		{"abcd-iabc.example.dev", badPort},
		{"3000x-iabc.example.dev", badPort},
		{"-3000-iabc.example.dev", badPort},
		{"-iabc.example.dev", badPort},
		{"iabc-3000.example.dev", badPort},
		// Ids.
		{"3000-.example.dev", badID},
		{"3000--iabc.example.dev", badID},
		{"3000-i_abc.example.dev", badID},
		{"65535-" + long + "a.example.dev", badHost}, // no DNS label
		{"1-" + long + "a.example.dev", badID},
		// Hosts.
		{"", badHost},
		{".", badHost},
		{"3000", badHost},
		{"3000-iabc", badHost},
		{"49983-iabc:8080", badHost},
		{"iabc.example.dev", badHost},
		{"3000.example.dev", badHost},
		{"example.dev", badHost},
		{".example.dev", badHost},
		{"-.example.dev", badPort},
		{"www.example.dev", badHost},
		{"3000-iabc.example.com", badHost},
		{"3000-iabc.xexample.dev", badHost},
		{"3000-iabc.example.dev.evil.test", badHost},
		{"3000-iabc.example.devil", badHost},
		{"3000-iabc.other.test", badHost},
		{"3000-iabc..example.dev", badHost},
		{"3000-iabc.example.dev..", badHost},
		{"3000-iabc.sub.example.dev", badHost},
		{"x.3000-iabc.example.dev", badHost},
		{"3000-iabc.api.example.dev", badHost},
		{"user@3000-iabc.example.dev", badHost},
		{"3000-iabc.example.dev@evil.test", badHost},
		{"user:3000-iabc.example.dev", badHost},
		{"3000-iabc.example.dev/path", badHost},
		{"3000-iabc.example.dev#", badHost},
		{"3000-iabc.example.dev?", badHost},
		{"3000-iabc.example.dev\\", badHost},
		{"3000-iabc%2eexample.dev", badHost},
		{" 3000-iabc.example.dev", badHost},
		{"3000-iabc.example.dev ", badHost},
		{"3000-iabc.example.dev\x00", badHost},
		{"3000-iabc.example.dev\r\nX: y", badHost},
		{"3000-iabc.example.dev,3000-iabc.example.dev", badHost},
		{"3000-iабв.example.dev", badHost},
		{"3000-iabc.e\u212axample.dev", badHost}, // the Kelvin sign is not a k
		{"3000-iabc.example.dev:", badHost},
		{"3000-iabc.example.dev:0", badHost},
		{"3000-iabc.example.dev:08", badHost},
		{"3000-iabc.example.dev:65536", badHost},
		{"3000-iabc.example.dev:80:80", badHost},
		{"3000-iabc.example.dev:http", badHost},
		{strings.Repeat("a", 300) + ".example.dev", badHost},
		{"3000-iabc" + strings.Repeat(".", 300) + "example.dev", badHost},
		// The control plane.
		{"api.example.dev", "api"},
		{"API.example.dev.:8443", "api"},
		{"api.example.com", badHost},
		{"x.api.example.dev", badHost},
		{"api", badHost},
		// Hosts that route by headers.
		{"sandbox.example.dev", "headers"},
		{"Sandbox.Example.dev:8443", "headers"},
		{"sandbox.example.com", badHost},
		{"sandbox.x.example.dev", badHost},
		{"localhost", "headers"},
		{"LOCALHOST:8080", "headers"},
		{"localhost.", "headers"},
		{"127.0.0.1", "headers"},
		{"127.0.0.1:8080", "headers"},
		{"8.8.8.8", "headers"},
		{"255.255.255.255:65535", "headers"},
		{"0.0.0.0", "headers"},
		{"[::1]", "headers"},
		{"[::1]:8080", "headers"},
		{"[2001:db8::1]", "headers"},
		{"[::ffff:10.0.0.1]:1", "headers"},
		{"::1", badHost},
		{"[::1", badHost},
		{"[::1]x", badHost},
		{"[::1]:", badHost},
		{"[::1]:0", badHost},
		{"[fe80::1%eth0]", badHost},
		{"[127.0.0.1]", badHost},
		{"[]", badHost},
		{"[" + strings.Repeat("0", 100) + "::1]", badHost},
		{"127.0.0.1.", badHost},
		{"127.0.0", badHost},
		{"127.0.0.0.1", badHost},
		{"127.0.0.256", badHost},
		{"127.0.0.01", badHost},
		{"127.0.0.0x1", badHost},
		{"127..0.1", badHost},
		{"2130706433", badHost},
		{"1.2.3.4.example.dev", badHost},
	}
	hosts := newHosts(t)
	for _, tt := range tests {
		input := []byte(tt.host)
		name, err := hosts.Parse(input)
		if got := describe(name, err); got != tt.want {
			t.Errorf("Parse(%q) = %s, want %s", tt.host, got, tt.want)
		}
		if string(input) != tt.host {
			t.Errorf("Parse(%q) has changed its input to %q", tt.host, input)
		}
	}
}

// describe also holds errors to their type.
func describe(name Name, err error) string {
	var bad *HostError
	if errors.As(err, &bad) {
		if errs.CodeOf(err) != errs.Invalid || errs.Message(err) != bad.Reason || name.Kind != 0 || name.Sandbox != nil {
			return fmt.Sprintf("error %v with code %v, message %q and name %+v", err, errs.CodeOf(err), errs.Message(err), name)
		}
		return bad.Reason
	}
	if err != nil {
		return "error of another type: " + err.Error()
	}
	switch name.Kind {
	case KindSandbox:
		return fmt.Sprintf("%d-%s", name.Port, name.Sandbox)
	case KindHeaders:
		return "headers"
	case KindAPI:
		return "api"
	}
	return fmt.Sprintf("kind %d", name.Kind)
}

func TestParseHeaders(t *testing.T) {
	tests := []struct{ id, port, want string }{
		{"iabc", "3000", "3000-iabc"},
		{"iabc", "65535", "65535-iabc"},
		{"", "", "Invalid host"},
		{"iabc", "", "missing header"},
		{"", "3000", "missing header"},
		{"iabc-6532622b", "3000", "Invalid sandbox ID"},
		{"iABC", "3000", "Invalid sandbox ID"},
		{"i_abc", "3000", "Invalid sandbox ID"},
		{" iabc", "3000", "Invalid sandbox ID"},
		{"../iabc", "3000", "Invalid sandbox ID"},
		{strings.Repeat("a", maxSandboxID+1), "3000", "Invalid sandbox ID"},
		{"iabc", "0", "Invalid sandbox port"},
		{"iabc", "03000", "Invalid sandbox port"},
		{"iabc", "65536", "Invalid sandbox port"},
		{"iabc", "-1", "Invalid sandbox port"},
		{"iabc", "+80", "Invalid sandbox port"},
		{"iabc", "80 ", "Invalid sandbox port"},
		{"iabc", "http", "Invalid sandbox port"},
	}
	for _, tt := range tests {
		if got := describe(ParseHeaders([]byte(tt.id), []byte(tt.port))); got != tt.want {
			t.Errorf("ParseHeaders(%q, %q) = %s, want %s", tt.id, tt.port, got, tt.want)
		}
	}
	if got := describe(ParseHeaders(nil, nil)); got != "Invalid host" {
		t.Errorf("ParseHeaders without headers = %s, want Invalid host", got)
	}
}

func TestNewHosts(t *testing.T) {
	for _, bad := range [][]string{
		nil, {""}, {"."}, {"example.dev:8443"}, {".example.dev"}, {"*.example.dev"}, {"exa mple.dev"}, {"-a.dev"}, {"a-.dev"},
		{"127.0.0.1"}, {"::1"}, {"example.dev", "b_c.dev"}, {strings.Repeat("a", 64) + ".dev"}, {strings.Repeat("a.", 100) + "dev"}, {"пример.dev"},
	} {
		if _, err := NewHosts(bad...); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("NewHosts(%q) = %v, want an error that says what is wrong", bad, err)
		}
	}
	hosts, err := NewHosts("a.b", "A.B.", "c")
	if err != nil || len(hosts.domains) != 2 {
		t.Errorf("NewHosts with a double = %d domains, %v, want 2", len(hosts.domains), err)
	}
}

// FuzzParse holds: what is accepted as a sandbox's name says the same when it is written in the canonical form, and every
// error is one of the contract's.
func FuzzParse(f *testing.F) {
	hosts := newHosts(f)
	for _, seed := range []string{
		"3000-iabc.example.dev", "3000-IABC-x.example.dev.:80", "[::1]:80", "127.0.0.1:1", "a@b", "api.example.dev", "sandbox.localhost", "localhost.:9", "-1-.e2b-x.app",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, host []byte) {
		before := string(host)
		name, err := hosts.Parse(host)
		if string(host) != before {
			t.Fatalf("Parse(%q) has changed its input", before)
		}
		switch got := describe(name, err); {
		case err != nil && got != errHost.Reason && got != errSandboxID.Reason && got != errSandboxPort.Reason:
			t.Fatalf("Parse(%q) = %s", host, got)
		case name.Kind == KindSandbox:
			for _, domain := range []string{"example.dev", "sbx.other.test"} {
				again, err := hosts.Parse([]byte(got + "." + domain))
				if describe(again, err) != got {
					t.Fatalf("Parse(%q) = %s, which parses to %s", host, got, describe(again, err))
				}
			}
			if byHeaders := describe(ParseHeaders(name.Sandbox, []byte(fmt.Sprint(name.Port)))); byHeaders != got {
				t.Fatalf("Parse(%q) = %s, by headers it is %s", host, got, byHeaders)
			}
			if !strings.HasPrefix(strings.ToLower(before), got) {
				t.Fatalf("Parse(%q) = %s, which is not how it begins", host, got)
			}
		}
	})
}

func FuzzParseHeaders(f *testing.F) {
	hosts := newHosts(f)
	f.Add([]byte("iabc"), []byte("3000"))
	f.Add([]byte(""), []byte("0"))
	f.Fuzz(func(t *testing.T, id, port []byte) {
		name, err := ParseHeaders(id, port)
		if err != nil {
			return
		}
		if string(name.Sandbox) != string(id) || fmt.Sprint(name.Port) != string(port) {
			t.Fatalf("ParseHeaders(%q, %q) = %+v", id, port, name)
		}
		if got := describe(hosts.Parse(fmt.Appendf(nil, "%s-%s.example.dev", port, id))); got != describe(name, nil) {
			t.Fatalf("ParseHeaders(%q, %q) = %s, as a host it is %s", id, port, describe(name, nil), got)
		}
	})
}
