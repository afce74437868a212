package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"
)

// card is the VM's one network card. Nobody in a VM of ours renames it.
const card = "eth0"

// up sets the network up: loopback, the card, its addresses, and the node as its neighbour and its way out.
func (n Network) up() error {
	nl, err := openNetlink(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.close()
	if err := nl.setUp("lo"); err != nil {
		return err
	}
	if !n.Addr.IsValid() && !n.Addr6.IsValid() {
		return nil
	}
	index := 0
	err = await(card, func() error {
		iface, err := net.InterfaceByName(card)
		if err == nil {
			index = iface.Index
		}
		return err
	})
	if err != nil {
		return err
	}
	// The card has the addresses that we give it and no others: one made from its hardware address would be that of the VM which the
	// memory was saved from, and nobody routes here but the node.
	for name, value := range map[string]string{"accept_ra": "0", "autoconf": "0", "addr_gen_mode": "1"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+card+"/"+name, []byte(value), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return fmt.Errorf("configure %s: %w", card, err)
		}
	}
	if err := nl.setUp(card); err != nil {
		return err
	}
	for _, side := range []struct {
		addr    netip.Prefix
		gateway netip.Addr
	}{{n.Addr, n.Gateway}, {n.Addr6, n.Gateway6}} {
		if !side.addr.IsValid() {
			continue
		}
		if err := nl.addAddress(index, side.addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", card, side.addr, err)
		}
		if !side.gateway.IsValid() {
			continue
		}
		if err := nl.addNeighbour(index, side.gateway, n.GatewayMAC); err != nil {
			return fmt.Errorf("make %s a neighbour: %w", side.gateway, err)
		}
		if err := nl.addDefaultRoute(index, side.gateway); err != nil {
			return fmt.Errorf("route by %s: %w", side.gateway, err)
		}
	}
	return nil
}

func (nl *netlink) setUp(name string) error {
	iface, err := net.InterfaceByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	body := bodyOf(unix.IfInfomsg{Index: int32(iface.Index), Flags: unix.IFF_UP, Change: unix.IFF_UP})
	if err := nl.do(unix.RTM_NEWLINK, 0, body); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func (nl *netlink) addAddress(index int, addr netip.Prefix) error {
	msg := unix.IfAddrmsg{Family: family(addr.Addr()), Prefixlen: uint8(addr.Bits()), Index: uint32(index)}
	if addr.Addr().Is6() {
		msg.Flags = unix.IFA_F_NODAD // nobody else can have it, and an address that is being asked about cannot be used yet
	}
	body := bodyOf(msg)
	body = appendAttribute(body, unix.IFA_LOCAL, addr.Addr().AsSlice())
	body = appendAttribute(body, unix.IFA_ADDRESS, addr.Addr().AsSlice())
	return nl.do(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

func (nl *netlink) addNeighbour(index int, addr netip.Addr, mac net.HardwareAddr) error {
	body := bodyOf(unix.NdMsg{Family: family(addr), Ifindex: int32(index), State: unix.NUD_PERMANENT})
	body = appendAttribute(body, unix.NDA_DST, addr.AsSlice())
	body = appendAttribute(body, unix.NDA_LLADDR, mac)
	return nl.do(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

func (nl *netlink) addDefaultRoute(index int, gateway netip.Addr) error {
	body := bodyOf(unix.RtMsg{
		Family: family(gateway), Table: unix.RT_TABLE_MAIN, Protocol: unix.RTPROT_BOOT, Scope: unix.RT_SCOPE_UNIVERSE, Type: unix.RTN_UNICAST,
	})
	body = appendAttribute(body, unix.RTA_GATEWAY, gateway.AsSlice())
	body = appendAttribute(body, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, uint32(index)))
	return nl.do(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, body)
}

// setMAC gives the card a hardware address, while it is up.
func setMAC(mac net.HardwareAddr) error {
	iface, err := net.InterfaceByName(card)
	if err != nil {
		return fmt.Errorf("find %s: %w", card, err)
	}
	nl, err := openNetlink(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.close()
	body := appendAttribute(bodyOf(unix.IfInfomsg{Index: int32(iface.Index)}), unix.IFLA_ADDRESS, mac)
	if err := nl.do(unix.RTM_NEWLINK, 0, body); err != nil {
		return fmt.Errorf("give %s the address %s: %w", card, mac, err)
	}
	return nil
}

func family(addr netip.Addr) uint8 {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
