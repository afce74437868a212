package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode"

	"github.com/sluice-edge/sluice/internal/config"
)

const (
	// callTimeout is a little longer than the server takes for anything.
	callTimeout = 80 * time.Second
	// maxAnswer is above what the server sends at once: a page of sandboxes, or of a log.
	maxAnswer = 32 << 20
)

// console is what an operator's command reads from and writes to.
type console struct {
	in       *os.File
	out, err io.Writer
	getenv   func(string) string
}

// onConsole makes a command of a function that names its console, so that a test can give it another one.
func onConsole(run func(ctx context.Context, args []string, con console) error) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		return run(ctx, args, console{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv})
	}
}

// serverConfig is how a command finds the server: as SDKs do, and flags win.
type serverConfig struct {
	url, key, domain string
}

func (c *serverConfig) flags(fs *flag.FlagSet) {
	fs.StringVar(&c.url, "api-url", "", "`URL` of the API; E2B_API_URL when empty, or else https://api.<domain>")
	fs.StringVar(&c.key, "api-key", "", "API `key`; E2B_API_KEY when empty")
	fs.StringVar(&c.domain, "domain", "", "base `domain` of the server; E2B_DOMAIN when empty")
}

// parse reads the flags of a command on sandboxes and the words beside them; usage says what those are.
func (c *serverConfig) parse(fs *flag.FlagSet, usage string, args []string, most int, con console) (words []string, err error) {
	c.flags(fs)
	config.Usage(fs, strings.TrimSpace("[flags] "+usage))
	words, err = config.ParseWords(fs, args, most, con.getenv, con.out)
	c.key = cmp.Or(c.key, con.getenv("E2B_API_KEY"))
	c.domain = cmp.Or(c.domain, con.getenv("E2B_DOMAIN"))
	c.url = cmp.Or(c.url, con.getenv("E2B_API_URL"))
	if c.url == "" && c.domain != "" {
		c.url = "https://api." + c.domain
	}
	return words, err
}

// client is the REST API as the operator's commands use it.
type client struct {
	url, key string
	http     *http.Client
}

// transport is http.DefaultTransport, except that names below localhost that nobody resolves are this machine's (RFC 6761, section 6.3).
// Browsers and curl do so by themselves; Go asks the name server for all but localhost itself.
func transport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if _, unknown := errors.AsType[*net.DNSError](err); !unknown {
			return conn, err
		}
		host, port, splitErr := net.SplitHostPort(address)
		if splitErr != nil || !strings.HasSuffix(strings.ToLower(host), ".localhost") {
			return conn, err
		}
		return dial(ctx, network, net.JoinHostPort("localhost", port))
	}
	return t
}

func (c *serverConfig) client() (*client, error) {
	if c.url == "" {
		return nil, errors.New("no server: set E2B_API_URL or give -api-url (`sluice dev` prints its own)")
	}
	if u, err := url.Parse(c.url); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("the server's address %q is no URL such as http://127.0.0.1:8080: see E2B_API_URL and -api-url", c.url)
	}
	if c.key == "" {
		return nil, errors.New("no API key: set E2B_API_KEY or give -api-key (`sluice dev` prints its own, `sluice key create` makes one)")
	}
	return &client{url: strings.TrimSuffix(c.url, "/"), key: c.key, http: &http.Client{
		Transport:     transport(),
		Timeout:       callTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the key goes nowhere else
	}}, nil
}

// refusal is what the server answers in place of what was asked for.
type refusal struct {
	status  int
	message string
}

func (r *refusal) Error() string { return r.message }

// isStatus tells whether the server refused with this status.
func isStatus(err error, status int) bool {
	r, ok := errors.AsType[*refusal](err)
	return ok && r.status == status
}

// sandboxPath is the path of a call about one sandbox.
func sandboxPath(id, call string) string { return "/sandboxes/" + url.PathEscape(id) + call }

// answered is what an answer says besides its body.
type answered struct {
	status int
	header http.Header
}

// call asks the server and decodes its answer into into, unless that is nil. body may be nil.
func (c *client) call(ctx context.Context, method, path string, body, into any) (answered, error) {
	var none answered
	var reader io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return none, fmt.Errorf("encode request: %w", err)
		}
		reader = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.url+path, reader)
	if err != nil {
		return none, err
	}
	req.Header.Set("X-API-Key", c.key)
	req.Header.Set("User-Agent", "sluice/"+version)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return none, c.unreachable(err)
	}
	defer resp.Body.Close()
	got := answered{resp.StatusCode, resp.Header}
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return none, fmt.Errorf("read the answer of %s: %w", c.url, err)
	case len(answer) > maxAnswer:
		return none, fmt.Errorf("the answer of %s is larger than %d bytes", c.url, maxAnswer)
	case resp.StatusCode/100 != 2:
		return none, c.refused(resp, answer)
	case into == nil:
		return got, nil
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return none, fmt.Errorf("%s is no API of Sluice: it answered %s with what is not the JSON expected: %w; see E2B_API_URL", c.url, resp.Status, err)
	}
	return got, nil
}

// unreachable names what to look at when there was no answer.
func (c *client) unreachable(err error) error {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err // it repeats method and address
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return fmt.Errorf("no server answers at %s: %w (does it run, and is that its address? see E2B_API_URL)", c.url, err)
	}
	if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return fmt.Errorf("ask %s: %w (for a certificate of sluice dev, SSL_CERT_FILE names the ca.pem that it prints)", c.url, err)
	}
	return fmt.Errorf("ask %s: %w", c.url, err)
}

// refused words a refusal, and says what to do where that is known.
func (c *client) refused(resp *http.Response, answer []byte) error {
	var body struct{ Message string }
	if err := json.Unmarshal(answer, &body); err != nil || body.Message == "" {
		return &refusal{resp.StatusCode, fmt.Sprintf("%s answered %s, which is no answer of Sluice: see E2B_API_URL", c.url, resp.Status)}
	}
	message := plain(body.Message)
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		message += " (the key comes from E2B_API_KEY or -api-key, for the server at " + c.url + ")"
	case http.StatusNotFound:
		message += " (`sluice ls` shows the sandboxes that there are)"
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if after := resp.Header.Get("Retry-After"); after != "" {
			message += " (try again in " + plain(after) + " s)"
		}
	}
	return &refusal{resp.StatusCode, message}
}

// plain is text from elsewhere as one line that does nothing to a terminal.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n' || r == '\u2028' || r == '\u2029':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r):
			return '\uFFFD'
		default:
			return r
		}
	}, s)
}

// cell is plain text for a table, which shows by a dash that there is none.
func cell(s string) string { return cmp.Or(plain(s), "-") }

// printJSON writes a value for programs.
func printJSON(out io.Writer, v any) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// printJSONLine writes one of several values for programs that read line by line.
func printJSONLine(out io.Writer, v any) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(v)
}

// oneID is the only word of a command that is about one sandbox.
func oneID(fs *flag.FlagSet, words []string) (string, error) {
	switch len(words) {
	case 0:
		return "", fmt.Errorf("%s: which sandbox? Give its id (`sluice ls` shows them)", fs.Name())
	case 1:
		return words[0], nil
	default:
		return "", fmt.Errorf("%s: %q is too much: one sandbox at a time", fs.Name(), words[1])
	}
}
