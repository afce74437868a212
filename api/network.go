package api

import (
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/net/idna"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
	"github.com/sluice-edge/sluice/sandboxd"
)

// networkOf is the network part of a create. Addresses are checked where they are turned into rules.
func networkOf(body *gen.NewSandbox, secured bool) (sandboxd.Network, error) {
	network := sandboxd.Network{AllowInternetAccess: body.AllowInternetAccess, AllowPublicTraffic: true}
	if body.Network == nil {
		return network, nil
	}
	network.AllowOut, network.DenyOut = body.Network.AllowOut, body.Network.DenyOut
	network.AllowPublicTraffic = !isFalse(body.Network.AllowPublicTraffic)
	if !network.AllowPublicTraffic && !secured {
		return network, errs.New(errs.Invalid, "You cannot create a sandbox without public access unless you enable secure envd access via 'secure' flag.")
	}
	if body.Network.MaskRequestHost != nil {
		network.MaskRequestHost = *body.Network.MaskRequestHost
		if err := checkMask(network.MaskRequestHost); err != nil {
			return network, err
		}
	}
	return network, nil
}

// refuseUnsupported names the first thing asked for that this server cannot do. Doing without it in silence would be worse.
func refuseUnsupported(body *gen.NewSandbox) error {
	for _, field := range []struct {
		name  string
		value any
	}{{"mcp", body.Mcp}, {"iam", body.Iam}} {
		if !isEmpty(field.value) {
			return notSupported(field.name)
		}
	}
	if len(body.VolumeMounts) > 0 {
		return notSupported("volumeMounts")
	}
	if body.Network == nil {
		return nil
	}
	for _, port := range body.Network.HTTPSPorts {
		if port < 1 || port > 65535 || port == 49983 {
			return errs.New(errs.Invalid, "network.httpsPorts: %d is not a port from 1 to 65535 other than 49983", port)
		}
	}
	if len(body.Network.HTTPSPorts) > 0 {
		return notSupported("network.httpsPorts")
	}
	return refuseUnsupportedEgress(body.Network.EgressProxy, body.Network.Rules)
}

func refuseUnsupportedEgress(egressProxy, rules gen.Unsupported) error {
	if !isEmpty(egressProxy) {
		return fail(http.StatusForbidden, "Egress proxy (network.egressProxy) is not enabled for this team.")
	}
	if !isEmpty(rules) {
		return notSupported("network.rules")
	}
	return nil
}

func notSupported(field string) error {
	return errs.New(errs.Invalid, "%s is not supported by this server", field)
}

// isEmpty tells whether a value asks for nothing: null, or an object or list with nothing in it but such values.
func isEmpty(v any) bool {
	switch v := v.(type) {
	case nil:
		return true
	case gen.Unsupported:
		return isEmpty(map[string]any(v))
	case map[string]any:
		for _, inner := range v {
			if !isEmpty(inner) {
				return false
			}
		}
		return true
	case []any:
		return len(v) == 0
	default:
		return false
	}
}

// maskPort stands for the requested port, in the host or after the colon.
const maskPort = "${PORT}"

// checkMask accepts a host, or host:port, that can be written into a Host header as it is.
func checkMask(mask string) error {
	if mask == "" {
		return nil // no mask
	}
	invalid := errs.New(errs.Invalid, "mask request host is not valid: %s", clip(mask))
	host, port, hasPort := strings.Cut(mask, ":${PORT}")
	if hasPort && port != "" {
		return invalid
	}
	if !hasPort {
		host, port, hasPort = strings.Cut(mask, ":")
		if n, err := strconv.ParseUint(port, 10, 16); hasPort && (err != nil || n == 0 || port[0] == '0') {
			return invalid
		}
	}
	host = strings.ReplaceAll(host, maskPort, "65535") // the longest it can become
	if len(host) > 253 {                               // before anything whose time grows faster than the name
		return invalid
	}
	ascii, err := idna.Display.ToASCII(host)
	if err != nil {
		return invalid
	}
	if !strings.EqualFold(ascii, host) || !isASCII(host) { // EqualFold also takes the long s for an s
		return errs.New(errs.Invalid, "mask request host must be ASCII only, such as %q for %q", clip(ascii), clip(host))
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(host, "."), ".") {
		if label == "" || len(label) > 63 {
			return invalid
		}
	}
	return nil
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}
