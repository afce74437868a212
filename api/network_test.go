package api

import (
	"strings"
	"testing"

	"golang.org/x/net/http/httpguts"

	"github.com/sluice-edge/sluice/internal/errs"
)

func TestCheckMask(t *testing.T) {
	for _, mask := range []string{
		"", "localhost", "localhost:${PORT}", "localhost:8080", "Example.COM", "custom-host.example.com:${PORT}", "127.0.0.1:3000", "xn--bcher-kva.de",
		"p${PORT}.example.com", "${PORT}.example.com:${PORT}", "example.com.", strings.Repeat("a", 63) + ".de", "localhost:65535",
	} {
		if err := checkMask(mask); err != nil {
			t.Errorf("checkMask(%q) = %v, want none", mask, err)
		}
	}
	for _, mask := range []string{
		"-https://abcd", "https://localhost", "localhost/path", "local host", " localhost", "localhost ", "a_b.de", "a..b", ".a", ".", ":", ":80", ":${PORT}",
		"localhost:", "localhost:0", "localhost:080", "localhost:65536", "localhost:-1", "localhost:+1", "localhost:http", "localhost:${port}", "localhost:1${PORT}",
		"localhost:${PORT}0", "localhost:80:80", "localhost:${PORT}:${PORT}", "[::1]:80", "::1", "a\r\nX-Evil: 1", "a\x00", "user@host", "a?b", "a#b", "a%b", "$PORT", "${HOST}",
		"bücher.de", "\u017f.de", "\u212a.de", "ⅷ.de", "xn--a", "xn--", strings.Repeat("a", 64), strings.Repeat("a.", 130), strings.Repeat("ü", 1<<19), "a\u200bb.de", "\xff",
	} {
		if err := checkMask(mask); errs.CodeOf(err) != errs.Invalid {
			t.Errorf("checkMask(%q) = %v, want Invalid", mask, err)
		}
	}
}

func FuzzCheckMask(f *testing.F) {
	for _, seed := range []string{"localhost:${PORT}", "example.com", "-https://abcd", "bücher.de", "\u017f.de", "\u212a.de", "a:1", "${PORT}${PORT}"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, mask string) {
		if mask == "" || checkMask(mask) != nil {
			return
		}
		host := strings.ReplaceAll(mask, "${PORT}", "3000")
		if !httpguts.ValidHostHeader(host) || strings.ContainsAny(host, "/\\@?#%$ \t\r\n,;") || strings.Count(host, ":") > 1 {
			t.Errorf("checkMask(%q) accepts what is no Host header", mask)
		}
	})
}
