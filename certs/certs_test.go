package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

const testDomain = "sbx.localhost"

// handshake connects to a listener with k's configuration and returns the leaf that the client saw and verified.
func handshake(t *testing.T, k *Keeper, roots *x509.CertPool, serverName string) (*x509.Certificate, error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_ = tls.Server(conn, k.TLSConfig()).Handshake() // the client's side of the failure is what the test looks at
	}()
	conn, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{RootCAs: roots, ServerName: serverName, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("negotiated protocol = %q, want http/1.1", got)
	}
	return conn.ConnectionState().PeerCertificates[0], nil
}

func rootsOf(t *testing.T, file string) *x509.CertPool {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		t.Fatalf("%s holds no certificate", file)
	}
	return pool
}

func newDev(t *testing.T, dir string, domains ...string) *Keeper {
	t.Helper()
	k, err := New(t.Context(), Options{Domains: domains, DevDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

func TestDevelopmentCAServesEveryName(t *testing.T) {
	k := newDev(t, t.TempDir(), testDomain)
	roots := rootsOf(t, k.CAFile())
	for _, name := range []string{"api." + testDomain, "49983-i0abc." + testDomain, testDomain, "localhost", "127.0.0.1"} {
		if _, err := handshake(t, k, roots, name); err != nil {
			t.Errorf("handshake for %s: %v", name, err)
		}
	}
	for _, name := range []string{"example.com", "a.b." + testDomain} {
		if _, err := handshake(t, k, roots, name); err == nil {
			t.Errorf("handshake for %s succeeded, want a refusal", name)
		}
	}
}

func TestDevelopmentCAOutlivesARestart(t *testing.T) {
	dir := t.TempDir()
	first := newDev(t, dir, testDomain)
	roots := rootsOf(t, first.CAFile())
	before, err := handshake(t, first, roots, "x."+testDomain)
	if err != nil {
		t.Fatal(err)
	}
	after, err := handshake(t, newDev(t, dir, testDomain), roots, "x."+testDomain)
	if err != nil {
		t.Fatal(err)
	}
	if !before.Equal(after) {
		t.Error("a restart issued a new certificate, want the stored one")
	}
	info, err := os.Stat(filepath.Join(dir, "ca-key.pem"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode of the CA key = %v, %v, want 0600", info.Mode(), err)
	}
}

// A stolen development CA must be worthless outside the development domains.
func TestDevelopmentCAIsConstrained(t *testing.T) {
	dir := t.TempDir()
	k := newDev(t, dir, testDomain)
	wide, err := New(t.Context(), Options{Domains: []string{testDomain}, DevDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer wide.Close()
	if err := wide.magic.ManageSync(t.Context(), []string{"bank.example.com"}); err != nil {
		t.Fatal(err)
	}
	_, err = handshake(t, wide, rootsOf(t, k.CAFile()), "bank.example.com")
	if err == nil || !strings.Contains(err.Error(), "permitted") {
		t.Errorf("handshake with a certificate outside the constraints: %v, want a refusal by name constraint", err)
	}
}

func TestDevelopmentCAIsReplacedForANewDomain(t *testing.T) {
	dir := t.TempDir()
	newDev(t, dir, testDomain)
	k := newDev(t, dir, testDomain, "other.localhost")
	if _, err := handshake(t, k, rootsOf(t, k.CAFile()), "1-i0.other.localhost"); err != nil {
		t.Errorf("handshake for the new domain: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ca.pem.old")); err != nil {
		t.Errorf("the old CA was not kept: %v", err)
	}
}

func TestDamagedCAIsReplaced(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), []byte("not a certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	k := newDev(t, dir, testDomain)
	if _, err := handshake(t, k, rootsOf(t, k.CAFile()), "x."+testDomain); err != nil {
		t.Errorf("handshake with the new CA: %v", err)
	}
	if old, err := os.ReadFile(filepath.Join(dir, "ca.pem.old")); err != nil || string(old) != "not a certificate" {
		t.Errorf("the damaged CA was not kept: %q, %v", old, err)
	}
}

// One start with a domain that cannot be certified must not cost the CA that works.
func TestBadDomainLeavesTheCAInForce(t *testing.T) {
	dir := t.TempDir()
	roots := rootsOf(t, newDev(t, dir, testDomain).CAFile())
	if k, err := New(t.Context(), Options{Domains: []string{"bad domain"}, DevDir: dir}); err == nil {
		k.Close()
		t.Fatal("New() took a domain with a space")
	}
	if _, err := handshake(t, newDev(t, dir, testDomain), roots, "x."+testDomain); err != nil {
		t.Errorf("handshake after the mistake: %v, want the old CA in force", err)
	}
}

// exportLeaf writes the certificate that dev serves for *.testDomain, as if another tool had renewed it.
func exportLeaf(t *testing.T, dev *Keeper, pair Pair) {
	t.Helper()
	stored, err := filepath.Glob(filepath.Join(dev.opts.DevDir, "issued-by-*", "certificates", "development", "wildcard_*"))
	if err != nil || len(stored) != 1 {
		t.Fatalf("stored wildcard certificates: %v, %v", stored, err)
	}
	base := filepath.Join(stored[0], filepath.Base(stored[0]))
	for from, to := range map[string]string{base + ".crt": pair.CertFile, base + ".key": pair.KeyFile} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.WriteFile(to, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestFilesAreReloadedAndABadOneLeavesTheOld(t *testing.T) {
	one, two := newDev(t, t.TempDir(), testDomain), newDev(t, t.TempDir(), testDomain)
	dir := t.TempDir()
	pair := Pair{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	exportLeaf(t, one, pair)
	core, logs := observer.New(zap.InfoLevel)
	k, err := New(t.Context(), Options{Domains: []string{testDomain}, Files: []Pair{pair}, Log: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	const name = "3000-i0." + testDomain
	if _, err := handshake(t, k, rootsOf(t, one.CAFile()), name); err != nil {
		t.Fatalf("handshake with the first file: %v", err)
	}

	k.reloadChanged(t.Context())
	if n := logs.FilterMessage("certificate reloaded").Len(); n != 0 {
		t.Errorf("an unchanged file was reloaded %d times", n)
	}
	exportLeaf(t, two, pair)
	k.reloadChanged(t.Context())
	if _, err := handshake(t, k, rootsOf(t, two.CAFile()), name); err != nil {
		t.Errorf("handshake after the change: %v", err)
	}
	if err := os.WriteFile(pair.CertFile, []byte("half a fi"), 0o600); err != nil {
		t.Fatal(err)
	}
	k.reloadChanged(t.Context())
	if _, err := handshake(t, k, rootsOf(t, two.CAFile()), name); err != nil {
		t.Errorf("handshake after a bad file: %v, want the old certificate in force", err)
	}
	if n := logs.FilterMessage("certificate not reloaded, the old one stays").Len(); n != 1 {
		t.Errorf("warnings for the bad file = %d, want 1", n)
	}
}

func TestNewRefusesWhatItCannotUse(t *testing.T) {
	missing := Pair{CertFile: filepath.Join(t.TempDir(), "no.crt"), KeyFile: "no.key"}
	for name, opts := range map[string]Options{
		"neither":      {},
		"both":         {Files: []Pair{missing}, DevDir: t.TempDir()},
		"missing file": {Files: []Pair{missing}},
	} {
		if k, err := New(context.Background(), opts); err == nil {
			k.Close()
			t.Errorf("%s: New() succeeded, want an error", name)
		}
	}
}
