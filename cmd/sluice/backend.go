package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/coder/websocket"

	"github.com/sluice-edge/sluice/internal/obs"
)

// serveBackend is what the benchmark loads: a small answer at /, the Host that it sees at /host, a WebSocket echo at /ws.
// It writes its address to out.
func serveBackend(ctx context.Context, addr string, out io.Writer) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	small := bytes.Repeat([]byte("x"), 1024)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write(small) // a client that left is its own business
	})
	mux.HandleFunc("GET /host", func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) })
	mux.HandleFunc("GET /ws", echoWebSocket)
	if _, err := fmt.Fprintln(out, ln.Addr()); err != nil {
		return err
	}
	return obs.ServeHTTP(ctx, ln, &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second})
}

func echoWebSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // any origin: it only echoes
	if err != nil {
		return // Accept has answered
	}
	defer conn.CloseNow()
	for {
		kind, message, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, message); err != nil {
			return
		}
	}
}

// benchClient drives the system as an SDK would, with the few calls that the benchmark needs.
type benchClient struct {
	url string // of the edge, plain http
	key string
}

// benchSandbox is what the API says about a new sandbox.
type benchSandbox struct {
	SandboxID          string
	EnvdAccessToken    string
	TrafficAccessToken string
}

func (c *benchClient) create(ctx context.Context, network map[string]any) (benchSandbox, error) {
	request := map[string]any{"templateID": "base"}
	if network != nil {
		request["network"] = network
	}
	body, err := json.Marshal(request)
	if err != nil {
		return benchSandbox{}, err
	}
	answer, err := c.do(ctx, c.url+"/v2/sandboxes", body, http.Header{"X-Api-Key": {c.key}, "Content-Type": {"application/json"}})
	if err != nil {
		return benchSandbox{}, fmt.Errorf("create a sandbox: %w", err)
	}
	var sb benchSandbox
	return sb, json.Unmarshal(answer, &sb)
}

// startBackend puts this program into the sandbox, starts it there, and waits until it answers under its public name.
func (c *benchClient) startBackend(ctx context.Context, sb benchSandbox, host string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	program, err := os.ReadFile(self)
	if err != nil {
		return err
	}
	envd := http.Header{"E2b-Sandbox-Id": {sb.SandboxID}, "E2b-Sandbox-Port": {"49983"}, "X-Access-Token": {sb.EnvdAccessToken}}
	upload := envd.Clone()
	upload.Set("Content-Type", "application/octet-stream")
	if _, err := c.do(ctx, c.url+"/files?username=user&path="+url.QueryEscape("/home/user/sluice"), program, upload); err != nil {
		return fmt.Errorf("upload the backend: %w", err)
	}
	start := envd.Clone()
	start.Set("Content-Type", "application/connect+json")
	start.Set("Connect-Protocol-Version", "1")
	start.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("user:")))
	script := fmt.Sprintf("chmod +x sluice && setsid ./sluice bench -serve 127.0.0.1:%d >/dev/null 2>&1 &", benchPort)
	message, err := json.Marshal(map[string]any{"process": map[string]any{"cmd": "/bin/bash", "args": []string{"-c", script}}, "stdin": false})
	if err != nil {
		return err
	}
	envelope := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))) // Connect: one flag byte, then the length
	if _, err := c.do(ctx, c.url+"/process.Process/Start", append(envelope, message...), start); err != nil {
		return fmt.Errorf("start the backend: %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url+"/host", nil)
		if err != nil {
			return err
		}
		req.Host = host
		if sb.TrafficAccessToken != "" {
			req.Header.Set("E2b-Traffic-Access-Token", sb.TrafficAccessToken)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the backend in sandbox %s does not answer: %s", sb.SandboxID, resp.Status)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// do posts and returns the whole answer; any status but 2xx is an error with the answer's text.
func (c *benchClient) do(ctx context.Context, url string, body []byte, header http.Header) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header = header
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, errors.New(resp.Status + ": " + string(answer))
	}
	return answer, nil
}
