package guest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// Network is how a VM reaches the world: by an address that is the same in every VM, and by the node, whose hardware address is known
// beforehand so that nobody asks for it. The node says it on the kernel's command line. The zero value is a VM with a loopback only.
type Network struct {
	Addr, Addr6       netip.Prefix // either may be missing, with its gateway
	Gateway, Gateway6 netip.Addr
	GatewayMAC        net.HardwareAddr
}

// The words of the command line.
const (
	wordAddr       = "sluice.ip"
	wordGateway    = "sluice.gw"
	wordGatewayMAC = "sluice.gwmac"
	wordAddr6      = "sluice.ip6"
	wordGateway6   = "sluice.gw6"
)

// Cmdline is the network's part of a kernel's command line.
func (n Network) Cmdline() string {
	var words []string
	say := func(word, value string, there bool) {
		if there {
			words = append(words, word+"="+value)
		}
	}
	say(wordAddr, n.Addr.String(), n.Addr.IsValid())
	say(wordGateway, n.Gateway.String(), n.Gateway.IsValid())
	say(wordGatewayMAC, n.GatewayMAC.String(), len(n.GatewayMAC) > 0)
	say(wordAddr6, n.Addr6.String(), n.Addr6.IsValid())
	say(wordGateway6, n.Gateway6.String(), n.Gateway6.IsValid())
	return strings.Join(words, " ")
}

// parseNetwork finds the network in a command line, among words for others. As with the kernel's own, the last of several counts.
func parseNetwork(cmdline string) (n Network, err error) {
	for word := range strings.FieldsSeq(cmdline) {
		name, value, _ := strings.Cut(word, "=")
		var err error
		switch name {
		case wordAddr:
			n.Addr, err = netip.ParsePrefix(value)
		case wordAddr6:
			n.Addr6, err = netip.ParsePrefix(value)
		case wordGateway:
			n.Gateway, err = netip.ParseAddr(value)
		case wordGateway6:
			n.Gateway6, err = netip.ParseAddr(value)
		case wordGatewayMAC:
			n.GatewayMAC, err = net.ParseMAC(value)
		}
		if err != nil {
			return Network{}, fmt.Errorf("kernel command line: %s: %w", name, err)
		}
	}
	if err := n.validate(); err != nil {
		return Network{}, fmt.Errorf("kernel command line: %w", err)
	}
	return n, nil
}

func (n Network) validate() error {
	switch {
	case n.Addr.IsValid() && !n.Addr.Addr().Is4():
		return fmt.Errorf("%s is %s, want an IPv4 address", wordAddr, n.Addr)
	case n.Addr6.IsValid() && (!n.Addr6.Addr().Is6() || n.Addr6.Addr().Is4In6()):
		return fmt.Errorf("%s is %s, want an IPv6 address", wordAddr6, n.Addr6)
	case !reaches(n.Addr, n.Gateway):
		return fmt.Errorf("%s is %s, want a neighbour of %s", wordGateway, n.Gateway, n.Addr)
	case !reaches(n.Addr6, n.Gateway6):
		return fmt.Errorf("%s is %s, want a neighbour of %s", wordGateway6, n.Gateway6, n.Addr6)
	case len(n.GatewayMAC) != 0 && (len(n.GatewayMAC) != 6 || n.GatewayMAC[0]&1 != 0):
		return fmt.Errorf("%s is %s, want the address of one Ethernet card", wordGatewayMAC, n.GatewayMAC)
	case len(n.GatewayMAC) == 0 && (n.Gateway.IsValid() || n.Gateway6.IsValid()):
		return errors.New(wordGatewayMAC + " is missing")
	}
	return nil
}

// reaches says whether a gateway, if there is one, is next to the address.
func reaches(addr netip.Prefix, gateway netip.Addr) bool {
	return !gateway.IsValid() || addr.Contains(gateway) && gateway != addr.Addr()
}
