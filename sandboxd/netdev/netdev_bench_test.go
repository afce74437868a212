//go:build linux

package netdev

import (
	"net"
	"testing"

	"github.com/sluice-edge/sluice/internal/lab"
)

func BenchmarkAcquireRelease(b *testing.B) { benchmarkAcquireRelease(b, Config{}) }

// The same with a tap and the translation of a machine's addresses.
func BenchmarkAcquireReleaseTap(b *testing.B) { benchmarkAcquireRelease(b, Config{Tap: true}) }

func benchmarkAcquireRelease(b *testing.B, cfg Config) {
	n := newNetworkWith(b, lab.New(b), cfg)
	for b.Loop() {
		if _, err := n.Acquire(b.Context(), 0); err != nil {
			b.Fatal(err)
		}
		if err := n.Release(b.Context(), 0); err != nil {
			b.Fatal(err)
		}
	}
}

// The same dial to a listener of the process's own namespace and to one inside a slot: the difference is the way in.
func BenchmarkDialDirect(b *testing.B) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	dialer := net.Dialer{KeepAlive: -1}
	for b.Loop() {
		conn, err := dialer.DialContext(b.Context(), "tcp4", ln.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}

func BenchmarkDialTCP(b *testing.B) {
	slot := acquire(b, newNetwork(b, lab.New(b)), 0)
	listen(b, slot, "tcp4", "127.0.0.1:3000", "")
	b.ReportAllocs()
	for b.Loop() {
		conn, err := slot.DialTCP(b.Context(), 3000)
		if err != nil {
			b.Fatal(err)
		}
		conn.Close()
	}
}

func BenchmarkDialRefused(b *testing.B) {
	slot := acquire(b, newNetwork(b, lab.New(b)), 0)
	for b.Loop() {
		if _, err := slot.DialTCP(b.Context(), 3000); err == nil {
			b.Fatal("somebody listens")
		}
	}
}
