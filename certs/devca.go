package certs

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/caddyserver/certmagic"
)

const (
	devCALifetime   = 10 * 365 * 24 * time.Hour
	devLeafLifetime = 90 * 24 * time.Hour // certmagic renews when a third is left
)

// devCA is a certificate authority for one machine. It implements certmagic.Issuer. People put it into trust stores, so its
// certificate carries name constraints (RFC 5280 section 4.2.1.10): it can vouch for our development domains and for the
// loopback, and for nothing else, even if its key is stolen.
type devCA struct {
	certFile string
	cert     *x509.Certificate
	key      crypto.Signer
}

// devNames are the names that get a certificate. A wildcard covers one level, so the base domain needs its own.
func devNames(domains []string) []string {
	names := []string{"localhost", "127.0.0.1", "::1"}
	for _, d := range domains {
		names = append(names, d, "*."+d)
	}
	return names
}

// openDevCA reads the CA from dir, or makes it. A CA that cannot be used, whose constraints do not cover the domains, or that is
// about to expire, is replaced once its successor is made; the old files are kept beside it with the suffix .old.
func openDevCA(dir string, domains []string) (*devCA, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory for the development CA: %w", err)
	}
	certFile, keyFile := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca-key.pem")
	ca, err := readDevCA(certFile, keyFile)
	if err == nil && ca.covers(domains) && time.Until(ca.cert.NotAfter) > 2*devLeafLifetime {
		return ca, nil
	}
	certDER, keyDER, err := makeDevCA(domains)
	if err != nil {
		return nil, err
	}
	for _, file := range []string{certFile, keyFile} {
		if err := os.Rename(file, file+".old"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("set aside the old development CA: %w", err)
		}
	}
	// The key first: a certificate without its key would look like a CA and could sign nothing.
	if err := writePEM(keyFile, "PRIVATE KEY", keyDER, 0o600); err != nil {
		return nil, err
	}
	if err := writePEM(certFile, "CERTIFICATE", certDER, 0o644); err != nil {
		return nil, err
	}
	return readDevCA(certFile, keyFile)
}

func readDevCA(certFile, keyFile string) (*devCA, error) {
	certDER, err := readPEM(certFile, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	keyDER, err := readPEM(keyFile, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(certDER)
	if err != nil {
		return nil, fmt.Errorf("development CA %s: %w", certFile, err)
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return nil, fmt.Errorf("development CA key %s: %w", keyFile, err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, fmt.Errorf("development CA key %s does not belong to %s", keyFile, certFile)
	}
	return &devCA{certFile: certFile, cert: cert, key: key}, nil
}

func readPEM(file, kind string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("%s holds no PEM block %q", file, kind)
	}
	return block.Bytes, nil
}

// makeDevCA returns a certificate that can be read again, and its key in PKCS #8.
func makeDevCA(domains []string) (certDER, keyDER []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate development CA key: %w", err)
	}
	host, _ := os.Hostname() // only part of a display name
	now := time.Now()
	template := &x509.Certificate{
		Subject:                     pkix.Name{CommonName: "Sluice development CA " + host, Organization: []string{"Sluice"}},
		NotBefore:                   now.Add(-time.Hour), // clocks in guests and browsers may lag a little
		NotAfter:                    now.Add(devCALifetime),
		IsCA:                        true,
		BasicConstraintsValid:       true,
		MaxPathLenZero:              true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         append([]string{"localhost"}, domains...),
		PermittedIPRanges: []*net.IPNet{
			{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)},
			{IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
		},
	}
	certDER, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign development CA: %w", err)
	}
	if _, err := x509.ParseCertificate(certDER); err != nil { // names are judged here, not where they are written
		return nil, nil, fmt.Errorf("development CA for %q: %w", domains, err)
	}
	if keyDER, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
		return nil, nil, fmt.Errorf("encode development CA key: %w", err)
	}
	return certDER, keyDER, nil
}

// writePEM replaces the file in one step, so that a crash leaves the old one or the new one.
func writePEM(file, kind string, der []byte, mode fs.FileMode) error {
	tmp := file + ".new"
	data := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return fmt.Errorf("write development CA: %w", err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("write development CA: %w", err)
	}
	return nil
}

func (ca *devCA) covers(domains []string) bool {
	for _, d := range domains {
		if !slices.ContainsFunc(ca.cert.PermittedDNSDomains, func(p string) bool { return strings.EqualFold(p, d) }) {
			return false
		}
	}
	return true
}

// id tells one CA from its successor, so that leaves of the old one are not served under the new one.
func (ca *devCA) id() string {
	sum := sha256.Sum256(ca.cert.Raw)
	return hex.EncodeToString(sum[:6])
}

// IssuerKey implements certmagic.Issuer.
func (ca *devCA) IssuerKey() string { return "development" }

// Issue implements certmagic.Issuer: it signs the names of the request as they are, the constraints being in the CA itself.
func (ca *devCA) Issue(_ context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	now := time.Now()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		NotBefore:   now.Add(-time.Hour),
		NotAfter:    now.Add(devLeafLifetime),
		DNSNames:    csr.DNSNames,
		IPAddresses: csr.IPAddresses,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}, ca.cert, csr.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign development certificate: %w", err)
	}
	chain := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return &certmagic.IssuedCertificate{Certificate: chain}, nil
}
