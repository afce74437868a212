package proxy

// Reason says why the edge itself ended a request instead of the sandbox. It is a metric label and a word in the access log.
type Reason uint8

// The reasons, in the order in which a request meets them.
const (
	reasonNone Reason = iota

	// The connection and the head.
	ReasonClientCap    // too many connections from one address
	ReasonTotalCap     // too many connections in all
	ReasonHeadTimeout  // the head took too long
	ReasonHeadTooLarge // the head is longer than we read
	ReasonMalformed    // the head or the body can be read in two ways, or in none
	ReasonExpectation  // an Expect that is not 100-continue

	// The name and the route.
	ReasonBadHost
	ReasonNotFound
	ReasonTooManyMisses
	ReasonStoreDown
	ReasonNodeLost

	// The decision.
	ReasonControlPath
	ReasonTokenMissing
	ReasonTokenInvalid
	ReasonPaused
	ReasonResumeDenied // it is paused, and this client may not have it woken
	ReasonSandboxCap
	ReasonBodyCap

	// The wake of a paused sandbox.
	ReasonWakeClientCap // the client has too many under way
	ReasonWakeTotalCap  // the edge has
	ReasonTransitioning // it did not come up, and may the next time

	// The way to the sandbox.
	ReasonPortClosed
	ReasonNodeBusy
	ReasonNodeRefused
	ReasonDialFailed

	// The exchange.
	ReasonUpstreamClosed    // it ended before an answer
	ReasonUpstreamMalformed // its answer can be read in two ways, or in none
	ReasonBodyTimeout       // the client stopped sending its body
	ReasonNoAPI             // no node serves the API
	ReasonPanic

	// Without an answer: there is nobody to read it, or part of one is out.
	ReasonClientGone
	ReasonAnswerCut // the sandbox's answer ended in the middle
	ReasonTunnelCut // an upgraded connection ended otherwise than in good order

	reasonCount
)

// format is how a refusal is written.
type format uint8

const (
	formatText format = iota // text/plain
	formatBody               // JSON for programs, a page for a person's browser
)

// refusal is what the client is told for a reason.
type refusal struct {
	label      string
	status     int
	format     format
	message    string
	title      string // of the page; empty: JSON for everybody
	retryAfter string // seconds
	limit      bool   // the body names the limit, and so does the message
	port       bool   // the body names the port
	anonymous  bool   // the body does not name the sandbox
}

var refusals = [reasonCount]refusal{
	reasonNone: {label: "none"},

	ReasonClientCap:    {label: "client_cap", status: 429, message: "Too many connections from your address", retryAfter: "1"},
	ReasonTotalCap:     {label: "total_cap", status: 503, message: "Too many connections", retryAfter: "1"},
	ReasonHeadTimeout:  {label: "head_timeout", status: 408, message: "The request took too long to arrive"},
	ReasonHeadTooLarge: {label: "head_too_large", status: 431, message: "The request head is too large"},
	ReasonMalformed:    {label: "malformed", status: 400, message: "Malformed request"},
	ReasonExpectation:  {label: "expectation", status: 417, message: "Unsupported expectation"},

	ReasonBadHost: {label: "bad_host", status: 400, message: "Invalid host"},
	ReasonNotFound: {label: "not_found", status: 502, format: formatBody,
		message: "The sandbox was not found", title: "Sandbox Not Found"},
	ReasonTooManyMisses: {label: "too_many_misses", status: 429, format: formatBody, retryAfter: "1",
		message: "Too many requests for unknown sandboxes", title: "Too Many Requests"},
	ReasonStoreDown: {label: "store_down", status: 503, format: formatBody, retryAfter: "1",
		message: "The sandbox cannot be looked up right now. Try again in a moment.", title: "Temporarily Unavailable"},
	ReasonNodeLost: {label: "node_lost", status: 503, format: formatBody, retryAfter: "5",
		message: "The machine of this sandbox does not answer. Try again in a moment.", title: "Temporarily Unavailable"},

	ReasonControlPath: {label: "control_path", status: 404, format: formatBody, anonymous: true, title: "Endpoint Not Available",
		message: "This endpoint is reserved for the E2B control plane and is not reachable through the sandbox URL"},
	ReasonTokenMissing: {label: "token_missing", status: 403, format: formatBody, title: "Missing Traffic Access Token",
		message: "Sandbox is secured with traffic access token. Token header 'e2b-traffic-access-token' is missing"},
	ReasonTokenInvalid: {label: "token_invalid", status: 403, format: formatBody, title: "Invalid Traffic Access Token",
		message: "Sandbox is secured with traffic access token. Provided token in header 'e2b-traffic-access-token' is invalid"},
	ReasonPaused: {label: "paused", status: 502, format: formatBody,
		message: "The sandbox was not found", title: "Sandbox Not Found"},
	ReasonResumeDenied: {label: "resume_denied", status: 403, format: formatBody, title: "Unable to Resume Sandbox",
		message: "This sandbox can't be resumed with the credentials provided. Check your access token and try again."},
	ReasonSandboxCap: {label: "sandbox_cap", status: 429, format: formatBody, retryAfter: "1", limit: true,
		message: "The sandbox has too many concurrent incoming connections (limit: %d)"},
	ReasonBodyCap: {label: "body_cap", status: 429, format: formatBody, retryAfter: "1", limit: true,
		message: "The sandbox has too many concurrent uploads (limit: %d)"},

	ReasonWakeClientCap: {label: "wake_client_cap", status: 429, format: formatBody, retryAfter: "1",
		message: "Too many paused sandboxes are being resumed for your address", title: "Too Many Requests"},
	ReasonWakeTotalCap: {label: "wake_total_cap", status: 503, format: formatBody, retryAfter: "1",
		message: "Too many paused sandboxes are being resumed. Try again in a moment.", title: "Temporarily Unavailable"},
	ReasonTransitioning: {label: "transitioning", status: 409, format: formatBody, retryAfter: "1",
		message: "The sandbox is still transitioning. Try again in a moment.", title: "Sandbox Still Transitioning"},

	ReasonPortClosed: {label: "port_closed", status: 502, format: formatBody, port: true,
		message: "The sandbox is running but port is not open", title: "Closed Port Error"},
	ReasonNodeBusy: {label: "node_busy", status: 503, format: formatBody, port: true, retryAfter: "1",
		message: "The machine of this sandbox is too busy. Try again in a moment.", title: "Temporarily Unavailable"},
	// Not a 502, which SDKs take for the sandbox's end: it may well live.
	ReasonNodeRefused: {label: "node_refused", status: 503, format: formatBody, port: true, retryAfter: "1",
		message: "The machine of this sandbox refused the connection", title: "Sandbox Unreachable"},
	ReasonDialFailed: {label: "dial_failed", status: 502, format: formatBody, port: true,
		message: "The machine of this sandbox could not be reached", title: "Sandbox Unreachable"},

	ReasonUpstreamClosed: {label: "upstream_closed", status: 502, format: formatBody, port: true,
		message: "The sandbox closed the connection before it answered", title: "Connection Closed"},
	ReasonUpstreamMalformed: {label: "upstream_malformed", status: 502, format: formatBody, port: true,
		message: "The sandbox sent an answer that is not valid HTTP", title: "Invalid Answer"},
	ReasonBodyTimeout: {label: "body_timeout", status: 408, message: "The request body took too long to arrive"},
	ReasonNoAPI: {label: "no_api", status: 503, format: formatBody, anonymous: true, retryAfter: "1",
		message: "The API does not answer. Try again in a moment."},
	ReasonPanic: {label: "panic", status: 500, message: "Internal error"},

	ReasonClientGone: {label: "client_gone"},
	ReasonAnswerCut:  {label: "answer_cut"},
	ReasonTunnelCut:  {label: "tunnel_cut"},
}

// String is the label used in logs and metrics.
func (r Reason) String() string {
	if r >= reasonCount {
		return "unknown"
	}
	return refusals[r].label
}
