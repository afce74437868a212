package link

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func samplePreface() preface {
	return preface{
		client:     netip.MustParseAddrPort("203.0.113.9:51000"),
		sandbox:    "i0123456789abcdefghij",
		generation: 1 << 40,
		port:       3000,
		stamp:      time.UnixMilli(1_790_000_000_123),
		nonce:      [nonceSize]byte{1, 2, 3, 15: 16},
	}
}

// encodeBody signs a body as the real encoder would, whatever is in it.
func encodeBody(head, body []byte, key *macKey) []byte {
	b := append(bytes.Clone(head), body...)
	b = append(b, tlvMAC, 0, macSize)
	binary.BigEndian.PutUint16(b[14:], uint16(len(b)+macSize-fixedSize))
	return key.appendMAC(b, b)
}

func TestPrefaceRoundTrip(t *testing.T) {
	key := newMACKey(testKey)
	long := samplePreface()
	long.client = netip.MustParseAddrPort("[2001:db8::1]:65535")
	long.sandbox, long.port = strings.Repeat("z", 57), 65535
	local := samplePreface()
	local.client = netip.AddrPort{}
	local.sandbox, local.port, local.generation = "a", 1, 0
	long.wake = true
	for _, want := range []preface{samplePreface(), long, local} {
		if err := want.check(); err != nil {
			t.Fatal(err)
		}
		raw := appendPreface(nil, &want, &key)
		if len(raw) < fixedSize+minBody || len(raw) > maxPreface {
			t.Errorf("%d bytes, want %d to %d", len(raw), fixedSize+minBody, maxPreface)
		}
		got, err := parsePreface(raw, &key)
		if err != nil || got != want {
			t.Errorf("parse = %+v, %v, want %+v", got, err, want)
		}
	}
	if raw := appendPreface(nil, &long, &key); len(raw) != maxPreface {
		t.Errorf("the longest preface has %d bytes, want maxPreface = %d", len(raw), maxPreface)
	}
	if raw := appendPreface(nil, &local, &key); len(raw) != fixedSize+minBody {
		t.Errorf("the shortest preface has %d bytes, want %d", len(raw), fixedSize+minBody)
	}

	mapped, zoned := samplePreface(), samplePreface()
	mapped.client = netip.MustParseAddrPort("[::ffff:203.0.113.9]:51000")
	zoned.client = netip.MustParseAddrPort("[fe80::1%eth9]:1")
	if got, err := parsePreface(appendPreface(nil, &mapped, &key), &key); err != nil || got != samplePreface() {
		t.Errorf("a mapped client = %v, %v, want the IPv4 address", got.client, err)
	}
	if got, err := parsePreface(appendPreface(nil, &zoned, &key), &key); err != nil || got.client.Addr().Zone() != "" {
		t.Errorf("a zoned client = %v, %v, want no zone", got.client, err)
	}
}

// The layout is what a reader of the PROXY protocol's text expects at each place.
func TestPrefaceLayout(t *testing.T) {
	key := newMACKey(testKey)
	p := samplePreface()
	p.sandbox = "abc"
	raw := appendPreface(nil, &p, &key)
	want := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x63" + // PROXY, TCP over IPv4, 99 bytes
		"\xcb\x00\x71\x09\x00\x00\x00\x00\xc7\x38\x0b\xb8" +
		"\x02\x00\x083000-abc" +
		"\xe0\x00\x08\x00\x00\x01\x00\x00\x00\x00\x00" +
		"\xe1\x00\x08" + string(binary.BigEndian.AppendUint64(nil, 1_790_000_000_123)) +
		"\xe2\x00\x10\x01\x02\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x10" +
		"\xe3\x00\x20"
	if got := string(raw[:len(raw)-macSize]); got != want {
		t.Errorf("layout\n%x, want\n%x", got, want)
	}
}

// A preface that wakes has one TLV more, right before the MAC, and is else the same: a node that does not know it refuses it,
// and serves all others of this edge.
func TestWakePrefaceLayout(t *testing.T) {
	key := newMACKey(testKey)
	p := samplePreface()
	plain := appendPreface(nil, &p, &key)
	p.wake = true
	raw := appendPreface(nil, &p, &key)
	want := append(bytes.Clone(plain[:len(plain)-macSize-tlvHead]), "\xe4\x00\x00\xe3\x00\x20"...)
	binary.BigEndian.PutUint16(want[14:], uint16(len(want)+macSize-fixedSize))
	if got := raw[:len(raw)-macSize]; !bytes.Equal(got, want) {
		t.Errorf("layout\n%x, want\n%x", got, want)
	}
}

func TestPrefaceCheck(t *testing.T) {
	tests := []struct {
		sandbox string
		port    uint16
		ok      bool
	}{
		{"a", 1, true}, {strings.Repeat("9", 57), 65535, true},
		{"", 1, false}, {"a", 0, false}, {strings.Repeat("9", 58), 1, false},
		{"A", 1, false}, {"a-b", 1, false}, {"a.b", 1, false}, {"a\x00", 1, false}, {"ä", 1, false},
	}
	for _, tt := range tests {
		p := preface{sandbox: tt.sandbox, port: tt.port}
		if err := p.check(); (err == nil) != tt.ok {
			t.Errorf("check of %q port %d = %v, want ok %t", tt.sandbox, tt.port, err, tt.ok)
		}
	}
}

// Every single changed bit, every truncation and every extra byte is refused.
func TestPrefaceTampering(t *testing.T) {
	key, other := newMACKey(testKey), newMACKey([]byte("another key"))
	p, wake := samplePreface(), samplePreface()
	wake.wake = true
	raw := appendPreface(nil, &p, &key)
	for _, raw := range [][]byte{raw, appendPreface(nil, &wake, &key)} {
		for i := range len(raw) * 8 {
			b := bytes.Clone(raw)
			b[i/8] ^= 1 << (i % 8)
			if _, err := parsePreface(b, &key); err == nil {
				t.Errorf("accepted with bit %d of byte %d changed", i%8, i/8)
			}
		}
	}
	for n := range raw {
		if _, err := parsePreface(raw[:n], &key); err == nil {
			t.Errorf("accepted %d of %d bytes", n, len(raw))
		}
	}
	if _, err := parsePreface(append(bytes.Clone(raw), 0), &key); err == nil {
		t.Error("accepted a byte too many")
	}
	if _, err := parsePreface(raw, &other); !errors.Is(err, errMAC) {
		t.Errorf("with another key: %v, want %v", err, errMAC)
	}
}

// What has a valid MAC and is not in the one form is refused all the same.
func TestPrefaceStrictness(t *testing.T) {
	key := newMACKey(testKey)
	head := func(command, family byte) []byte { return append([]byte(signature), command, family, 0, 0) }
	tlv := func(kind byte, value string) string {
		return string([]byte{kind, byte(len(value) >> 8), byte(len(value))}) + value
	}
	eight, nonce := strings.Repeat("\x00", 8), strings.Repeat("n", 16)
	tail := tlv(tlvGeneration, eight) + tlv(tlvTime, eight) + tlv(tlvNonce, nonce)
	auth := tlv(tlvAuthority, "80-abc")
	v4 := "\x7f\x00\x00\x01\x00\x00\x00\x00\x12\x34\x00\x50"
	v6 := "\x20\x01" + strings.Repeat("\x00", 30) + "\x12\x34\x00\x50"
	tests := []struct {
		name string
		head []byte
		body string
		ok   bool
	}{
		{"local", head(0x20, 0x00), auth + tail, true},
		{"IPv4", head(0x21, 0x11), v4 + auth + tail, true},
		{"IPv6", head(0x21, 0x21), v6 + auth + tail, true},
		{"version 1", head(0x11, 0x11), v4 + auth + tail, false},
		{"command 2", head(0x22, 0x11), v4 + auth + tail, false},
		{"UDP", head(0x21, 0x12), v4 + auth + tail, false},
		{"Unix", head(0x21, 0x31), v4 + auth + tail, false},
		{"PROXY without address", head(0x21, 0x00), auth + tail, false},
		{"LOCAL with address", head(0x20, 0x11), v4 + auth + tail, false},
		{"destination address", head(0x21, 0x11), "\x7f\x00\x00\x01\x00\x00\x00\x01\x12\x34\x00\x50" + auth + tail, false},
		{"destination port differs", head(0x21, 0x11), "\x7f\x00\x00\x01\x00\x00\x00\x00\x12\x34\x00\x51" + auth + tail, false},
		{"mapped address", head(0x21, 0x21),
			strings.Repeat("\x00", 10) + "\xff\xff\x7f\x00\x00\x01" + strings.Repeat("\x00", 16) + "\x12\x34\x00\x50" + auth + tail, false},
		{"no authority", head(0x20, 0x00), tail + tlv(0x04, "......"), false},
		{"extra TLV", head(0x20, 0x00), auth + tail + tlv(0x04, ""), false},
		{"authority twice", head(0x20, 0x00), auth + auth + tail, false},
		{"wake", head(0x20, 0x00), auth + tail + tlv(tlvWake, ""), true},
		{"wake with a value", head(0x20, 0x00), auth + tail + tlv(tlvWake, "1"), false},
		{"wake twice", head(0x20, 0x00), auth + tail + tlv(tlvWake, "") + tlv(tlvWake, ""), false},
		{"wake at another place", head(0x20, 0x00), tlv(tlvWake, "") + auth + tail, false},
		{"wake and more", head(0x20, 0x00), auth + tail + tlv(tlvWake, "") + tlv(0x04, ""), false},
		{"other order", head(0x20, 0x00), tail + auth, false},
		{"short generation", head(0x20, 0x00), auth + tlv(tlvGeneration, "1234567") + tlv(tlvTime, eight) + tlv(tlvNonce, nonce+"n"), false},
		{"year 10000", head(0x20, 0x00), auth + tlv(tlvGeneration, eight) + tlv(tlvTime, "\x01"+eight[1:]) + tlv(tlvNonce, nonce), false},
		{"authority longer than the header", head(0x20, 0x00), "\x02\xff\xff80-abc" + tail, false},
	}
	for _, authority := range []string{"080-abc", "0-abc", "65536-abc", "99999-abc", "800000-a", "+80-abc", "80-", "80abc", "-abc", "80", "", "80-a-b",
		"80-ABC", "80-a.b", "80-" + strings.Repeat("a", 58)} {
		tests = append(tests, struct {
			name string
			head []byte
			body string
			ok   bool
		}{"authority " + authority, head(0x20, 0x00), tlv(tlvAuthority, authority) + tail, false})
	}
	for _, tt := range tests {
		raw := encodeBody(tt.head, []byte(tt.body), &key)
		p, err := parsePreface(raw, &key)
		if (err == nil) != tt.ok {
			t.Errorf("%s: %v, want ok %t", tt.name, err, tt.ok)
		}
		if err == nil && !bytes.Equal(appendPreface(nil, &p, &key), raw) {
			t.Errorf("%s: encoded again it differs", tt.name)
		}
		if err != nil && errors.Is(err, errMAC) {
			t.Errorf("%s: the test's own MAC is wrong", tt.name)
		}
	}
}

func TestReadPreface(t *testing.T) {
	key := newMACKey(testKey)
	p := samplePreface()
	raw := appendPreface(nil, &p, &key)
	sized := func(n int) string { return signature + "\x21\x11" + string([]byte{byte(n >> 8), byte(n)}) }
	tests := []struct {
		name, in string
		left     int // unread bytes
		err      error
	}{
		{"whole", string(raw), 0, nil},
		{"with a stream after it", string(raw) + "GET / HTTP/1.1\r\n", 16, nil},
		{"nothing", "", 0, io.EOF},
		{"a part of the prefix", signature, 0, io.ErrUnexpectedEOF},
		{"truncated", string(raw[:len(raw)-1]), 0, io.ErrUnexpectedEOF},
		{"another protocol", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 11, errNotPreface},
		{"version 1", "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n", 16, errNotPreface},
		{"too short", sized(minBody-1) + strings.Repeat("x", minBody-1), minBody - 1, errNotPreface},
		{"too long", sized(maxBody+1) + strings.Repeat("x", maxBody+1), maxBody + 1, errNotPreface},
		{"longest there is", sized(65535) + strings.Repeat("x", 65535), 65535, errNotPreface},
	}
	for _, tt := range tests {
		for _, slow := range []bool{false, true} {
			in := strings.NewReader(tt.in)
			var r io.Reader = in
			if slow {
				r = iotest.OneByteReader(in)
			}
			var buf [maxPreface]byte
			got, err := readPreface(r, &buf)
			if !errors.Is(err, tt.err) || in.Len() != tt.left {
				t.Errorf("%s: %v with %d bytes left, want %v with %d", tt.name, err, in.Len(), tt.err, tt.left)
			}
			if err == nil && !bytes.Equal(got, raw) {
				t.Errorf("%s: read %x, want %x", tt.name, got, raw)
			}
		}
	}
}

// FuzzPreface feeds whatever comes as a stream, and with a MAC put right, so that the decoder behind it is reached too.
func FuzzPreface(f *testing.F) {
	key := newMACKey(testKey)
	p := samplePreface()
	f.Add(appendPreface(nil, &p, &key))
	p.client = netip.MustParseAddrPort("[2001:db8::1]:443")
	f.Add(append(appendPreface(nil, &p, &key), "stream"...))
	p.client = netip.AddrPort{}
	f.Add(appendPreface(nil, &p, &key))
	p.wake = true
	f.Add(appendPreface(nil, &p, &key))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		check := func(in []byte) {
			r := bytes.NewReader(in)
			var buf [maxPreface]byte
			raw, err := readPreface(r, &buf)
			if err != nil {
				return
			}
			if want := fixedSize + int(binary.BigEndian.Uint16(in[14:])); len(in)-r.Len() != want {
				t.Fatalf("read %d bytes of a header of %d", len(in)-r.Len(), want)
			}
			p, err := parsePreface(raw, &key)
			if err != nil {
				return
			}
			if err := p.check(); err != nil {
				t.Fatalf("accepted what the dialer would not send: %v", err)
			}
			if again := appendPreface(nil, &p, &key); !bytes.Equal(again, raw) {
				t.Fatalf("accepted %x, which encodes as %x", raw, again)
			}
		}
		check(in)
		if len(in) < fixedSize+minBody {
			return
		}
		signed := bytes.Clone(in[:min(len(in), maxPreface)])
		copy(signed, signature)
		binary.BigEndian.PutUint16(signed[14:], uint16(len(signed)-fixedSize))
		key.appendMAC(signed[:len(signed)-macSize], signed[:len(signed)-macSize])
		check(signed)
	})
}
