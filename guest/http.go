package guest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/sluice-edge/sluice/guest/gen/filesystem/filesystemconnect"
	"github.com/sluice-edge/sluice/guest/gen/process/processconnect"
)

// maxMessageBytes bounds one RPC message. The largest that SDKs send is a write to stdin, base64 in JSON.
const maxMessageBytes = 64 << 20

// controlPaths belong to the private socket. On the public port they do not exist, whatever token comes with them.
var controlPaths = []string{"/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade", "/resume", "/clock", "/sync", "/exec"}

// publicHandler is the surface for SDKs: everything but control.
func (a *agent) publicHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", serveHealth)
	mux.HandleFunc("GET /metrics", a.serveMetrics)
	mux.HandleFunc("GET /envs", a.serveEnvs)
	mux.HandleFunc("GET /files", a.serveDownload)
	mux.HandleFunc("POST /files", a.serveUpload)
	mux.HandleFunc("POST /files/compose", a.serveCompose)
	limit := connect.WithReadMaxBytes(maxMessageBytes)
	mux.Handle(processconnect.NewProcessHandler(processService{a}, limit))
	mux.Handle(filesystemconnect.NewFilesystemHandler(filesystemService{a}, limit))

	outer := http.NewServeMux()
	outer.Handle("/", a.requireToken(withWriter(mux)))
	for _, path := range controlPaths {
		outer.HandleFunc(path, serveNotFound)
	}
	return allowOrigins(a.awaitInit(outer))
}

// awaitInit lets nobody in before the node has said who may come, not even to ask for health: it would call well what cannot be used yet.
func (a *agent) awaitInit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !a.settings.get().ready {
			w.Header().Set("Cache-Control", "no-store")
			writeError(w, http.StatusServiceUnavailable, "the sandbox is starting")
			return
		}
		next.ServeHTTP(w, r)
	})
}

func serveHealth(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

func serveNotFound(w http.ResponseWriter, _ *http.Request) {
	writeError(w, http.StatusNotFound, "not found")
}

func (a *agent) serveEnvs(w http.ResponseWriter, _ *http.Request) {
	env := a.settings.get().env
	if env == nil {
		env = map[string]string{}
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, env)
}

// exposedHeaders are those that a page's script may read besides the safe ones: what connect and gRPC-Web clients look at.
const exposedHeaders = "Location, Cache-Control, X-Content-Type-Options, Content-Encoding, Content-Disposition, " +
	"Connect-Content-Encoding, Connect-Protocol-Version, Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin"

// allowOrigins answers preflights and opens the answers to every origin. Nothing here lives on cookies, so an origin proves nothing anyway.
func allowOrigins(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		if r.Header.Get("Origin") != "" {
			h.Set("Access-Control-Allow-Origin", "*")
			h.Set("Access-Control-Expose-Headers", exposedHeaders)
		}
		if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
			next.ServeHTTP(w, r)
			return
		}
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Allow-Methods", "HEAD, GET, POST, PUT, PATCH, DELETE")
		h.Add("Vary", "Access-Control-Request-Headers")
		// A literal * does not cover Authorization, so what was asked for is named.
		if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
			h.Set("Access-Control-Allow-Headers", asked)
		}
		h.Set("Access-Control-Max-Age", "7200")
		w.WriteHeader(http.StatusNoContent)
	})
}

type writerKey struct{}

// withWriter puts the connection's deadlines within reach of RPC handlers, which see no ResponseWriter.
func withWriter(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := context.WithValue(r.Context(), writerKey{}, http.NewResponseController(w))
		next.ServeHTTP(w, r.WithContext(ctx))
	})
}

// boundWrites makes a stream with a deadline fail soon after it even when the client does not read: a blocked write cannot see its context end.
func boundWrites(ctx context.Context) {
	deadline, ok := ctx.Deadline()
	rc, has := ctx.Value(writerKey{}).(*http.ResponseController)
	if ok && has {
		_ = rc.SetWriteDeadline(deadline.Add(5 * time.Second)) // unsupported by test recorders only
	}
}

// basicUser is the name in an Authorization header of the Basic scheme; empty when there is none.
func basicUser(h http.Header) (string, error) {
	scheme, credentials, ok := strings.Cut(h.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Basic") {
		return "", nil
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(credentials))
	if err != nil {
		return "", errors.New("malformed basic credentials")
	}
	name, _, _ := strings.Cut(string(raw), ":")
	return name, nil
}

// rpcActor is the user that an RPC acts as.
func (a *agent) rpcActor(h http.Header) (account, error) {
	name, err := basicUser(h)
	if err != nil {
		return account{}, connect.NewError(connect.CodeUnauthenticated, err)
	}
	u, err := a.actor(name)
	if err != nil {
		if name == "" {
			name = a.settings.get().user
		}
		a.log.Debug("user not found", "user", name, "error", err)
		return account{}, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s'", name))
	}
	return u, nil
}

// rpcPath resolves a path of an RPC for the user it acts as.
func (a *agent) rpcPath(h http.Header, path string) (string, account, error) {
	u, err := a.rpcActor(h)
	if err != nil {
		return "", account{}, err
	}
	abs, err := a.resolve(path, u)
	if err != nil {
		return "", account{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return abs, u, nil
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	raw, err := json.Marshal(body)
	if err != nil {
		panic("BUG: unmarshalable answer: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(raw) // the client may have gone away
}

func writeError(w http.ResponseWriter, status int, message string) {
	writeJSON(w, status, struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, message})
}
