package lab

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// Name makes the laboratory's DNS answer name with these addresses; "*.x" covers everything below x that has no entry of its own.
func (l *Lab) Name(name string, addrs ...netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.names[strings.ToLower(strings.TrimSuffix(name, "."))] = addrs
}

// lookup finds the addresses of a name, nil when there is none.
func (l *Lab) lookup(name string) []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if addrs, ok := l.names[name]; ok {
		return addrs
	}
	for rest := name; ; {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			return nil
		}
		if addrs, ok := l.names["*."+parent]; ok {
			return addrs
		}
		rest = parent
	}
}

// Hits returns everything that arrived so far at an address; the zero Addr means at any.
func (l *Lab) Hits(at netip.Addr) []Hit {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Collect(func(yield func(Hit) bool) {
		for _, hit := range l.hits {
			if (!at.IsValid() || hit.At.Addr() == at) && !yield(hit) {
				return
			}
		}
	})
}

// Sunk is how many bytes the sinks have swallowed so far.
func (l *Lab) Sunk() int64 { return l.sunk.Load() }

func (l *Lab) record(proto string, at, from net.Addr, name string) {
	hit := Hit{Proto: proto, At: addrPort(at), From: addrPort(from), Name: name, Time: time.Now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hits = append(l.hits, hit)
}

func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// serve starts every server of the internet. Those for TCP listen on all addresses at once, those for UDP on each one, because
// their answers have to come from it; a wildcard socket behind them catches what falls into a trap.
func (l *Lab) serve() error {
	tcp := map[uint16]func(net.Conn){
		PortEcho:   func(c net.Conn) { _, _ = io.Copy(c, c) },
		PortStream: streamTCP,
		PortSink:   func(c net.Conn) { _, _ = io.Copy((*sink)(l), c) },
	}
	for port, handle := range tcp {
		ln, err := l.listenTCP(port)
		if err != nil {
			return err
		}
		l.servers.Go(func() { l.acceptLoop(ln, handle) })
	}
	if err := l.serveHTTP(); err != nil {
		return err
	}
	wild := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	for _, addr := range slices.Concat(Internet, Traps, wild) {
		for port, handle := range map[uint16]func(net.PacketConn){PortEcho: l.echoUDP, PortStream: l.streamUDP, PortSink: l.sinkUDP} {
			pc, err := l.listenUDP(netip.AddrPortFrom(addr, port))
			if err != nil {
				return err
			}
			l.servers.Go(func() { handle(pc) })
		}
		pc, err := l.listenUDP(netip.AddrPortFrom(addr, 53))
		if err != nil {
			return err
		}
		l.startDNS(&dns.Server{PacketConn: pc})
	}
	ln, err := l.listenTCP(53)
	if err != nil {
		return err
	}
	l.startDNS(&dns.Server{Listener: ln})
	return nil
}

func (l *Lab) listenTCP(port uint16) (ln net.Listener, err error) {
	err = in(l.internet, func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	})
	if err == nil {
		l.closers = append(l.closers, func() { _ = ln.Close() })
	}
	return ln, err
}

func (l *Lab) listenUDP(at netip.AddrPort) (pc net.PacketConn, err error) {
	network := "udp4"
	if at.Addr().Is6() {
		network = "udp6"
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// An address and the wildcard share the port; the kernel prefers the address.
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	err = in(l.internet, func() (err error) {
		pc, err = config.ListenPacket(context.Background(), network, at.String())
		return err
	})
	if err == nil {
		l.closers = append(l.closers, func() { _ = pc.Close() })
	}
	return pc, err
}

func (l *Lab) acceptLoop(ln net.Listener, handle func(net.Conn)) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		l.record("tcp", conn.LocalAddr(), conn.RemoteAddr(), "")
		l.conns.add(conn)
		l.servers.Go(func() {
			defer l.conns.remove(conn)
			handle(conn)
		})
	}
}

func streamTCP(c net.Conn) {
	block := bytes.Repeat([]byte("sluice."), 4096)
	for {
		if _, err := c.Write(block); err != nil {
			return
		}
	}
}

// sink is the Lab as the writer that its sinks copy to.
type sink Lab

func (s *sink) Write(b []byte) (int, error) {
	s.sunk.Add(int64(len(b)))
	return len(b), nil
}

func (l *Lab) eachDatagram(pc net.PacketConn, handle func(b []byte, from net.Addr)) {
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP answer to something we sent
		}
		handle(b[:n], from)
	}
}

func (l *Lab) echoUDP(pc net.PacketConn) {
	l.eachDatagram(pc, func(b []byte, from net.Addr) {
		l.record("udp", pc.LocalAddr(), from, "")
		_, _ = pc.WriteTo(b, from)
	})
}

func (l *Lab) sinkUDP(pc net.PacketConn) {
	l.eachDatagram(pc, func(b []byte, _ net.Addr) { l.sunk.Add(int64(len(b))) })
}

// streamUDP sends to whoever sent a datagram until the laboratory closes.
func (l *Lab) streamUDP(pc net.PacketConn) {
	l.eachDatagram(pc, func(_ []byte, to net.Addr) {
		l.record("udp", pc.LocalAddr(), to, "")
		l.servers.Go(func() {
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-l.closed:
					return
				case <-tick.C:
					_, _ = pc.WriteTo([]byte("sluice"), to)
				}
			}
		})
	})
}

// serveHTTP answers on 80 and, with a certificate for whatever name was asked for, on 443: which address it is, and which name.
func (l *Lab) serveHTTP() error {
	for proto, port := range map[string]uint16{"http": 80, "https": 443} {
		ln, err := l.listenTCP(port)
		if err != nil {
			return err
		}
		server := &http.Server{
			ReadHeaderTimeout: 10 * time.Second,
			TLSConfig:         &tls.Config{GetCertificate: l.ca.certificate, MinVersion: tls.VersionTLS12},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				at, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
				from, _ := net.ResolveTCPAddr("tcp", r.RemoteAddr) // an address, not a name
				l.record(proto, at, from, r.Host)
				fmt.Fprintf(w, "%s %s %s\n", proto, addrPort(at).Addr(), r.Host)
			}),
			ErrorLog: log.New(io.Discard, "", 0), // handshakes cut on purpose
			ConnState: func(c net.Conn, state http.ConnState) {
				if state == http.StateNew {
					l.record("tcp", c.LocalAddr(), c.RemoteAddr(), "")
				}
			},
		}
		l.closers = append(l.closers, func() { _ = server.Close() })
		l.servers.Go(func() {
			if proto == "https" {
				_ = server.ServeTLS(ln, "", "")
				return
			}
			_ = server.Serve(ln)
		})
	}
	return nil
}

func (l *Lab) startDNS(server *dns.Server) {
	server.Handler = dns.HandlerFunc(l.answer)
	started := make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	l.closers = append(l.closers, func() { _ = server.Shutdown() })
	l.servers.Go(func() { _ = server.ActivateAndServe() })
	<-started
}

func (l *Lab) answer(w dns.ResponseWriter, query *dns.Msg) {
	reply := new(dns.Msg).SetReply(query)
	reply.Authoritative = true
	for _, q := range query.Question {
		l.record("dns", w.LocalAddr(), w.RemoteAddr(), strings.TrimSuffix(q.Name, "."))
		addrs := l.lookup(q.Name)
		if addrs == nil {
			reply.Rcode = dns.RcodeNameError
		}
		for _, addr := range addrs {
			head := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: 1}
			switch {
			case q.Qtype == dns.TypeA && addr.Is4():
				reply.Answer = append(reply.Answer, &dns.A{Hdr: head, A: addr.AsSlice()})
			case q.Qtype == dns.TypeAAAA && addr.Is6():
				reply.Answer = append(reply.Answer, &dns.AAAA{Hdr: head, AAAA: addr.AsSlice()})
			}
		}
	}
	_ = w.WriteMsg(reply)
}

// connSet is the connections that close ends.
type connSet struct {
	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]struct{}
}

func (s *connSet) add(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = c.Close()
		return
	}
	if s.conns == nil {
		s.conns = map[net.Conn]struct{}{}
	}
	s.conns[c] = struct{}{}
}

func (s *connSet) remove(c net.Conn) {
	_ = c.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

func (s *connSet) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for c := range s.conns {
		_ = c.Close()
	}
}

// lockedBuffer collects what a program writes on two descriptors.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Bytes()
}
