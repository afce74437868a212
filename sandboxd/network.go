package sandboxd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"go.uber.org/zap"
	"go4.org/netipx"

	"github.com/sluice-edge/sluice/sandboxd/egress"
)

// fenceOf reads the egress half of a network configuration.
func fenceOf(n Network) (egress.Policy, error) {
	return egress.ParsePolicy(n.AllowInternetAccess, n.AllowOut, n.DenyOut)
}

// UpdateNetwork replaces the egress half of a sandbox's network configuration whole: what is not given is cleared. The ingress half
// stays. On an error the old configuration is in force and stored, with one exception: a change that only takes away does not wait
// for a disk that is full or broken. It is in force, the error says that its record is missing, and the record is tried again.
//
// Restart applies what the record says. So a change that only takes away is recorded before it is applied, any other one after: a
// crash in between leaves the tighter of the two, and what is stored and what is in force always agree.
func (m *Manager) UpdateNetwork(ctx context.Context, id string, n Network) error {
	fence, err := fenceOf(n)
	if err != nil {
		return err
	}
	l, end, err := m.begin(ctx, id)
	if err != nil {
		return err
	}
	defer end()
	ctx, cancel := l.within(ctx)
	defer cancel()
	old := m.record(l)
	oldFence, err := fenceOf(old.Sandbox.Network)
	if err != nil {
		return fmt.Errorf("egress rules in the record: %w", err)
	}
	rec := old
	n = n.clone()
	rec.Sandbox.Network.AllowInternetAccess = n.AllowInternetAccess
	rec.Sandbox.Network.AllowOut = n.AllowOut
	rec.Sandbox.Network.DenyOut = n.DenyOut

	apply := func(ctx context.Context, p egress.Policy) error {
		if err := l.instance.SetFence(ctx, p); err != nil {
			return fmt.Errorf("apply egress rules: %w", err)
		}
		return nil
	}
	back := func() error { // also when the caller has gone; not when the sandbox is going
		ctx, cancel := context.WithTimeout(l.ctx, guestTime)
		defer cancel()
		return apply(ctx, oldFence)
	}
	if tightens(oldFence, fence) {
		writeErr := m.journal.update(rec)
		if err := apply(ctx, fence); err != nil {
			oldErr := m.journal.update(old)
			if oldErr != nil {
				m.owe(l)
			}
			return errors.Join(err, back(), oldErr)
		}
		if writeErr != nil {
			if !m.setRecord(l, rec) {
				return inTransition(id, StateKilling)
			}
			return m.enforced(l, writeErr)
		}
	} else {
		if err := apply(ctx, fence); err != nil {
			return errors.Join(err, back())
		}
		if err := m.journal.update(rec); err != nil {
			return errors.Join(err, back())
		}
	}
	if !m.setRecord(l, rec) {
		return inTransition(id, StateKilling)
	}
	l.log.Info("network updated", zap.Int("allow", len(fence.Allow)), zap.Int("deny", len(fence.Deny)))
	return nil
}

// tightens tells whether to permits nothing that from does not.
func tightens(from, to egress.Policy) bool {
	refusedBefore, err1 := refused(from)
	refusedAfter, err2 := refused(to)
	if err1 != nil || err2 != nil {
		return false
	}
	return !slices.ContainsFunc(refusedBefore.Ranges(), func(r netipx.IPRange) bool { return !refusedAfter.ContainsRange(r) })
}

// refused is the set of addresses that a policy refuses by the tenant's choice.
func refused(p egress.Policy) (*netipx.IPSet, error) {
	var set netipx.IPSetBuilder
	deny := p.Deny
	if !p.AllowInternet {
		deny = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	}
	for _, prefix := range deny {
		set.AddPrefix(prefix)
	}
	for _, prefix := range p.Allow {
		set.RemovePrefix(prefix)
	}
	return set.IPSet()
}

// protect adds to a policy what no sandbox of this node may reach whatever its tenant allows: the addresses of its interfaces, and more.
func protect(fence egress.Policy, more []netip.Prefix) (egress.Policy, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return egress.Policy{}, fmt.Errorf("list addresses of this node: %w", err)
	}
	fence.Protected = slices.Concat(fence.Protected, more)
	for _, a := range addrs {
		ipnet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		if addr, ok := netip.AddrFromSlice(ipnet.IP); ok {
			addr = addr.Unmap()
			fence.Protected = append(fence.Protected, netip.PrefixFrom(addr, addr.BitLen()))
		}
	}
	return fence, nil
}
