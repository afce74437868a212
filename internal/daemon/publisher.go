package daemon

import (
	"context"
	"time"

	"github.com/sluice-edge/sluice/routing"
	"github.com/sluice-edge/sluice/sandboxd"
)

// publisher lets sandboxd write routes without knowing routing: it translates, and adds the name of this node.
type publisher struct {
	store    routing.Store
	node     routing.Node // its addresses; the numbers come with each announcement
	leaseTTL time.Duration
}

// Publish implements sandboxd.Publisher.
func (p *publisher) Publish(ctx context.Context, sb sandboxd.Published) error {
	return p.store.PutRoute(ctx, p.route(sb))
}

// Withdraw implements sandboxd.Publisher.
func (p *publisher) Withdraw(ctx context.Context, sandbox string, generation uint64) error {
	return p.store.DeleteRoute(ctx, sandbox, generation)
}

// Published implements sandboxd.Publisher.
func (p *publisher) Published(ctx context.Context) ([]sandboxd.Published, error) {
	routes, err := p.store.RoutesOf(ctx, p.node.ID)
	if err != nil {
		return nil, err
	}
	published := make([]sandboxd.Published, len(routes))
	for i, r := range routes {
		published[i] = fromRoute(r)
	}
	return published, nil
}

// Announce implements sandboxd.Publisher.
func (p *publisher) Announce(ctx context.Context, c sandboxd.Capacity) error {
	node := p.node
	node.Sandboxes, node.MaxSandboxes, node.Machine, node.Draining = c.Sandboxes, c.MaxSandboxes, c.Machine, c.Draining
	return p.store.PutNode(ctx, node, p.leaseTTL)
}

func (p *publisher) route(sb sandboxd.Published) routing.Route {
	r := routing.Route{
		Version:    routing.RouteVersion,
		Sandbox:    sb.Sandbox,
		Node:       p.node.ID,
		Generation: sb.Generation,
		State:      routing.State(sb.State),
		EndAt:      sb.EndAt,
		TokenHash:  sb.TokenHash,
		Mask:       sb.Mask,
		AutoResume: sb.AutoResume,
		EnvdHash:   sb.EnvdHash,
	}
	if len(sb.HTTPSPorts) > 0 {
		r.Ports = make(map[uint16]routing.PortSettings, len(sb.HTTPSPorts))
		for _, port := range sb.HTTPSPorts {
			r.Ports[port] = routing.PortSettings{HTTPS: true}
		}
	}
	return r
}

func fromRoute(r routing.Route) sandboxd.Published {
	sb := sandboxd.Published{
		Sandbox:    r.Sandbox,
		Generation: r.Generation,
		State:      sandboxd.State(r.State),
		EndAt:      r.EndAt,
		TokenHash:  r.TokenHash,
		Mask:       r.Mask,
		AutoResume: r.AutoResume,
		EnvdHash:   r.EnvdHash,
	}
	for port, settings := range r.Ports {
		if settings.HTTPS {
			sb.HTTPSPorts = append(sb.HTTPSPorts, port)
		}
	}
	return sb
}
