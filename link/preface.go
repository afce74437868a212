package link

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"time"
)

// The preface is a PROXY protocol v2 header in one fixed form, all numbers in network order:
//
//	12  signature
//	 1  0x21 PROXY, on behalf of a client; 0x20 LOCAL, the edge itself
//	 1  0x11 TCP over IPv4, 0x21 TCP over IPv6; 0x00 with LOCAL
//	 2  length of what follows
//	12, 36 or 0  client address, zero address, client port, port in the sandbox
//	TLV 0x02 PP2_TYPE_AUTHORITY  "<port>-<sandboxID>"
//	TLV 0xE0  lifecycle generation, 8 bytes
//	TLV 0xE1  time, 8 bytes: milliseconds since 1970
//	TLV 0xE2  nonce, 16 random bytes
//	TLV 0xE4  wake, empty; only where the edge wants no connection but the sandbox awake
//	TLV 0xE3  HMAC-SHA256, 32 bytes, over every byte before these 32
//
// The order is fixed, nothing but the wake is optional and nothing may be added: an accepted preface has exactly one encoding.
// A change of the form changes macLabel, so that old and new never half understand each other. The wake did not change
// it: a node from before it can wake nothing, refuses such a preface whole, and understands all others.
const (
	signature = "\r\n\r\n\x00\r\nQUIT\n"

	commandLocal = 0x20
	commandProxy = 0x21

	familyNone = 0x00
	familyTCP4 = 0x11
	familyTCP6 = 0x21

	tlvAuthority  = 0x02
	tlvGeneration = 0xE0
	tlvTime       = 0xE1
	tlvNonce      = 0xE2
	tlvMAC        = 0xE3
	tlvWake       = 0xE4

	fixedSize   = 16 // up to and with the length
	macSize     = sha256.Size
	nonceSize   = 16
	tlvHead     = 3
	tlvsSize    = 5*tlvHead + 8 + 8 + nonceSize + macSize // without the authority's text
	maxLabel    = 63                                      // the authority is a DNS label too
	minBody     = tlvsSize + len("1-x")
	maxBody     = 36 + tlvsSize + tlvHead + maxLabel // the head is that of the wake
	maxPreface  = fixedSize + maxBody
	macLabel    = "sluice link preface v1"
	addr4Size   = 4 + 4 + 2 + 2
	addr6Size   = 16 + 16 + 2 + 2
	stampWindow = 30 * time.Second // how far the clocks of edge and node may differ
)

// What is wrong with a preface. A peer that caused one of these is not told: it has not shown that it knows the key.
var (
	errNotPreface = errors.New("not a link preface")
	errMAC        = errors.New("preface is not authentic")
)

// preface is the content of the header.
type preface struct {
	client     netip.AddrPort // invalid: the edge itself
	sandbox    string
	generation uint64
	port       uint16
	stamp      time.Time // whole milliseconds
	nonce      [nonceSize]byte
	wake       bool
}

// macKey signs prefaces. It is derived, so that the cluster key itself is used for nothing but deriving.
type macKey [sha256.Size]byte

func newMACKey(clusterKey []byte) macKey {
	key, err := hkdf.Key(sha256.New, clusterKey, nil, macLabel, sha256.Size)
	if err != nil {
		panic("BUG: derive link key: " + err.Error()) // only a length beyond HKDF's can fail
	}
	return macKey(key)
}

func (k *macKey) appendMAC(dst, signed []byte) []byte {
	mac := hmac.New(sha256.New, k[:])
	mac.Write(signed)
	return mac.Sum(dst)
}

// check says why p cannot be sent, or nil.
func (p *preface) check() error {
	if p.port == 0 {
		return errors.New("port 0")
	}
	if !validSandbox(p.sandbox) {
		return fmt.Errorf("sandbox id %q", p.sandbox)
	}
	return nil
}

// validSandbox tells whether id may stand in an authority: what the host grammar allows, short enough for a label with
// the longest port.
func validSandbox[T string | []byte](id T) bool {
	if len(id) == 0 || len(id) > maxLabel-len("65535-") {
		return false
	}
	for i := range len(id) {
		if c := id[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') {
			return false
		}
	}
	return true
}

// appendPreface appends the signed header to dst. p has passed check.
func appendPreface(dst []byte, p *preface, key *macKey) []byte {
	start := len(dst)
	dst = append(dst, signature...)
	addr := p.client.Addr().Unmap().WithZone("")
	switch {
	case !addr.IsValid():
		dst = append(dst, commandLocal, familyNone, 0, 0)
	case addr.Is4():
		dst = append(dst, commandProxy, familyTCP4, 0, 0)
		dst = append(dst, addr.AsSlice()...)
		dst = append(dst, make([]byte, 4)...)
		dst = appendPorts(dst, p)
	default:
		dst = append(dst, commandProxy, familyTCP6, 0, 0)
		dst = append(dst, addr.AsSlice()...)
		dst = append(dst, make([]byte, 16)...)
		dst = appendPorts(dst, p)
	}

	at := len(dst)
	dst = append(dst, tlvAuthority, 0, 0)
	dst = strconv.AppendUint(dst, uint64(p.port), 10)
	dst = append(dst, '-')
	dst = append(dst, p.sandbox...)
	binary.BigEndian.PutUint16(dst[at+1:], uint16(len(dst)-at-tlvHead))

	dst = append(dst, tlvGeneration, 0, 8)
	dst = binary.BigEndian.AppendUint64(dst, p.generation)
	dst = append(dst, tlvTime, 0, 8)
	dst = binary.BigEndian.AppendUint64(dst, uint64(p.stamp.UnixMilli()))
	dst = append(dst, tlvNonce, 0, nonceSize)
	dst = append(dst, p.nonce[:]...)
	if p.wake {
		dst = append(dst, tlvWake, 0, 0)
	}
	dst = append(dst, tlvMAC, 0, macSize)
	binary.BigEndian.PutUint16(dst[start+14:], uint16(len(dst)+macSize-start-fixedSize))
	return key.appendMAC(dst, dst[start:])
}

func appendPorts(dst []byte, p *preface) []byte {
	dst = binary.BigEndian.AppendUint16(dst, p.client.Port())
	return binary.BigEndian.AppendUint16(dst, p.port)
}

// readPreface reads exactly one header from r into buf and not a byte more, and returns it unparsed. The first 16 bytes
// decide whether the rest is read at all.
func readPreface(r io.Reader, buf *[maxPreface]byte) ([]byte, error) {
	if _, err := io.ReadFull(r, buf[:fixedSize]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(buf[14:]))
	if string(buf[:12]) != signature || n < minBody || n > maxBody {
		return nil, errNotPreface
	}
	if _, err := io.ReadFull(r, buf[fixedSize:fixedSize+n]); err != nil {
		return nil, err
	}
	return buf[:fixedSize+n], nil
}

// parsePreface checks and decodes a whole header as readPreface returned it. Nothing in it is looked at before its MAC
// holds. Time and nonce are for the caller to judge.
func parsePreface(b []byte, key *macKey) (preface, error) {
	if len(b) < fixedSize+minBody {
		return preface{}, errNotPreface
	}
	signed, sum := b[:len(b)-macSize], b[len(b)-macSize:]
	var want [macSize]byte
	if !hmac.Equal(key.appendMAC(want[:0], signed), sum) {
		return preface{}, errMAC
	}
	return decodePreface(b)
}

// decodePreface is parsePreface without the MAC.
func decodePreface(b []byte) (preface, error) {
	d := decoder{rest: b}
	var p preface
	if string(d.take(len(signature))) != signature {
		return preface{}, errNotPreface
	}
	command, family := d.byte(), d.byte()
	if int(d.uint16()) != len(d.rest) {
		return preface{}, errNotPreface
	}
	var destinationPort uint16
	switch {
	case command == commandLocal && family == familyNone:
	case command == commandProxy && family == familyTCP4:
		addr := netip.AddrFrom4([4]byte(d.take(4)))
		d.zeros(4)
		p.client, destinationPort = netip.AddrPortFrom(addr, d.uint16()), d.uint16()
	case command == commandProxy && family == familyTCP6:
		addr := netip.AddrFrom16([16]byte(d.take(16)))
		d.zeros(16)
		d.bad = d.bad || addr.Is4In6() // it would have a second encoding
		p.client, destinationPort = netip.AddrPortFrom(addr, d.uint16()), d.uint16()
	default:
		return preface{}, errNotPreface
	}

	d.byteIs(tlvAuthority)
	p.port, p.sandbox = d.authority(d.take(int(d.uint16())))
	d.tlv(tlvGeneration, 8)
	p.generation = d.uint64()
	d.tlv(tlvTime, 8)
	ms := d.uint64()
	d.tlv(tlvNonce, nonceSize)
	copy(p.nonce[:], d.take(nonceSize))
	if p.wake = len(d.rest) > 0 && d.rest[0] == tlvWake; p.wake {
		d.tlv(tlvWake, 0)
	}
	d.tlv(tlvMAC, macSize)
	d.take(macSize)

	const year10000 = 253402300800000 // keeps the arithmetic on times exact
	if d.bad || len(d.rest) != 0 || ms >= year10000 || (p.client.IsValid() && destinationPort != p.port) {
		return preface{}, errNotPreface
	}
	p.stamp = time.UnixMilli(int64(ms))
	return p, nil
}

// decoder takes bytes off the front; once something did not fit it is bad and gives zeros.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) take(n int) []byte {
	if n > len(d.rest) {
		d.bad, d.rest = true, nil
		return make([]byte, min(n, maxPreface))
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

func (d *decoder) byte() byte     { return d.take(1)[0] }
func (d *decoder) uint16() uint16 { return binary.BigEndian.Uint16(d.take(2)) }
func (d *decoder) uint64() uint64 { return binary.BigEndian.Uint64(d.take(8)) }

func (d *decoder) byteIs(want byte) { d.bad = d.byte() != want || d.bad }

func (d *decoder) tlv(kind byte, size uint16) {
	d.byteIs(kind)
	d.bad = d.uint16() != size || d.bad
}

func (d *decoder) zeros(n int) {
	for _, b := range d.take(n) {
		d.bad = d.bad || b != 0
	}
}

// authority reads "<port>-<sandboxID>" with the one spelling that appendPreface gives it.
func (d *decoder) authority(b []byte) (uint16, string) {
	port := 0
	i := 0
	for ; i < len(b) && i < 5 && b[i] >= '0' && b[i] <= '9'; i++ {
		port = port*10 + int(b[i]-'0')
	}
	if i == 0 || b[0] == '0' || port > 65535 || i == len(b) || b[i] != '-' || !validSandbox(b[i+1:]) {
		d.bad = true
		return 0, ""
	}
	return uint16(port), string(b[i+1:])
}
