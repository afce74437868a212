// Package certs keeps the edge's certificates: from files, reloaded when they change, or from a development CA that it makes
// by itself. certmagic is the keeper of both: it selects by SNI, renews, and stores; so another issuer (ACME) is one more
// certmagic.Issuer and no new seam. The package opens no listener; cmd/edge and `sluice dev` ask it for a tls.Config.
package certs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/caddyserver/certmagic"
	"go.uber.org/zap"
)

// Pair is one certificate on disk. Both files are PEM; the certificate file starts with the leaf.
type Pair struct {
	CertFile, KeyFile string
}

// Options say where certificates come from. Exactly one of Files and DevDir is set.
type Options struct {
	// Domains are the base domains served: each needs itself and one wildcard level.
	Domains []string
	// Files are certificates that somebody else renews.
	Files []Pair
	// DevDir holds the development CA and what it issued. It is made when absent, readable by its owner only.
	DevDir string
	// ReloadInterval is how often Files are looked at; zero means 5s. Looking is a read and a hash of a few kilobytes, and
	// unlike a file watch it survives renames, symlink swaps and network file systems.
	ReloadInterval time.Duration
	Log            *zap.Logger
}

// Keeper holds the certificates in memory and keeps them fresh while Run runs.
type Keeper struct {
	// Fixed after New.
	opts  Options
	cache *certmagic.Cache
	magic *certmagic.Config
	ca    *devCA // nil without a development CA
	log   *zap.Logger

	// Owned by New, then by Run.
	loaded []loadedPair // one per opts.Files
}

type loadedPair struct {
	sum  [sha256.Size]byte // of both files, to see a change
	hash string            // certmagic's name for the certificate in its cache
}

// New loads or makes every certificate, so that a mistake in a file is an error at start and not at the first handshake.
// The caller runs Run for renewals and reloads, and calls Close when it does not.
func New(ctx context.Context, opts Options) (*Keeper, error) {
	if (len(opts.Files) == 0) == (opts.DevDir == "") {
		return nil, errors.New("certs: give either certificate files or a directory for the development CA, not both")
	}
	if opts.ReloadInterval == 0 {
		opts.ReloadInterval = 5 * time.Second
	}
	if opts.Log == nil {
		opts.Log = zap.NewNop()
	}
	k := &Keeper{opts: opts, log: opts.Log, loaded: make([]loadedPair, len(opts.Files))}
	k.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return k.magic, nil },
		Logger:           opts.Log.Named("certmagic").WithOptions(zap.IncreaseLevel(zap.WarnLevel)),
	})
	cfg := certmagic.Config{
		Logger: opts.Log.Named("certmagic").WithOptions(zap.IncreaseLevel(zap.WarnLevel)),
		// Stapling would make a start depend on an outside responder.
		OCSP: certmagic.OCSPConfig{DisableStapling: true},
	}
	if opts.DevDir != "" {
		ca, err := openDevCA(opts.DevDir, opts.Domains)
		if err != nil {
			k.cache.Stop()
			return nil, err
		}
		k.ca = ca
		cfg.Issuers = []certmagic.Issuer{ca}
		cfg.Storage = &certmagic.FileStorage{Path: filepath.Join(opts.DevDir, "issued-by-"+ca.id())}
	}
	k.magic = certmagic.New(k.cache, cfg)
	if err := k.load(ctx); err != nil {
		k.cache.Stop()
		return nil, err
	}
	return k, nil
}

func (k *Keeper) load(ctx context.Context) error {
	if k.ca != nil {
		if err := k.magic.ManageSync(ctx, devNames(k.opts.Domains)); err != nil {
			return fmt.Errorf("issue development certificates in %s: %w", k.opts.DevDir, err)
		}
		return nil
	}
	for i := range k.opts.Files {
		if _, err := k.reload(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// Run reloads files that changed, until ctx ends; certmagic renews what it issued in goroutines of its own, which Run stops.
// A new file that cannot be used is logged and leaves the old certificate in force.
func (k *Keeper) Run(ctx context.Context) error {
	defer k.Close()
	tick := time.NewTicker(k.opts.ReloadInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			k.reloadChanged(ctx)
		}
	}
}

func (k *Keeper) reloadChanged(ctx context.Context) {
	for i, pair := range k.opts.Files {
		changed, err := k.reload(ctx, i)
		switch {
		case err != nil:
			k.log.Warn("certificate not reloaded, the old one stays", zap.Error(err))
		case changed:
			k.log.Info("certificate reloaded", zap.String("file", pair.CertFile))
		}
	}
}

// Close stops certmagic's maintenance. It is for a Keeper whose Run is never called.
func (k *Keeper) Close() { k.cache.Stop() }

// TLSConfig is for the edge's listeners. Only HTTP/1.1 is offered: a protocol is offered when there is a server for it.
func (k *Keeper) TLSConfig() *tls.Config {
	return &tls.Config{
		GetCertificate: k.magic.GetCertificate,
		NextProtos:     []string{"http/1.1"},
		MinVersion:     tls.VersionTLS12,
	}
}

// CAFile is the path of the development CA's certificate, for clients' trust stores; empty without a development CA.
func (k *Keeper) CAFile() string {
	if k.ca == nil {
		return ""
	}
	return k.ca.certFile
}

// reload loads pair i when its bytes differ from those in use. It says whether it did.
func (k *Keeper) reload(ctx context.Context, i int) (bool, error) {
	pair := k.opts.Files[i]
	certPEM, err := os.ReadFile(pair.CertFile)
	if err != nil {
		return false, fmt.Errorf("read certificate: %w", err)
	}
	keyPEM, err := os.ReadFile(pair.KeyFile)
	if err != nil {
		return false, fmt.Errorf("read certificate key: %w", err)
	}
	sum := sha256.Sum256(bytes.Join([][]byte{certPEM, keyPEM}, []byte{0}))
	old := k.loaded[i]
	if sum == old.sum {
		return false, nil
	}
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return false, fmt.Errorf("certificate %s with key %s: %w", pair.CertFile, pair.KeyFile, err)
	}
	k.warnUncovered(pair.CertFile, cert.Leaf)
	hash, err := k.magic.CacheUnmanagedTLSCertificate(ctx, cert, nil)
	if err != nil {
		return false, fmt.Errorf("certificate %s: %w", pair.CertFile, err)
	}
	if old.hash != "" && old.hash != hash {
		k.cache.Remove([]string{old.hash}) // after the new one is in, so that no handshake finds neither
	}
	k.loaded[i] = loadedPair{sum: sum, hash: hash}
	return true, nil
}

// warnUncovered tells the operator what browsers will complain about. It is no error: with several files each may cover a part.
func (k *Keeper) warnUncovered(file string, leaf *x509.Certificate) {
	if left := time.Until(leaf.NotAfter); left < 0 {
		k.log.Warn("certificate has expired", zap.String("file", file), zap.Time("not_after", leaf.NotAfter))
	}
	for _, domain := range k.opts.Domains {
		if leaf.VerifyHostname("3000-i0."+domain) != nil {
			k.log.Warn("certificate does not cover sandbox names", zap.String("file", file), zap.String("host", "*."+domain))
		}
	}
}
