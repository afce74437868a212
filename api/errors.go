package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"go.uber.org/zap"

	"github.com/sluice-edge/sluice/api/gen"
	"github.com/sluice-edge/sluice/internal/errs"
)

// statuses is how an errs.Code looks on this listener.
var statuses = map[errs.Code]int{
	errs.Internal:    http.StatusInternalServerError,
	errs.Invalid:     http.StatusBadRequest,
	errs.NotFound:    http.StatusNotFound,
	errs.Denied:      http.StatusForbidden,
	errs.Conflict:    http.StatusConflict,
	errs.Exhausted:   http.StatusTooManyRequests,
	errs.Unavailable: http.StatusServiceUnavailable,
}

// Why a sandbox could not be placed: the error_code of the contract.
const (
	codeNoCapacity   = "sandbox_capacity_unavailable"
	codeNoNode       = "sandbox_no_compatible_node"
	codeTimeout      = "sandbox_placement_timeout"
	codeCreateFailed = "sandbox_create_failed"
)

// maxMessage bounds what an answer repeats of a request. Whoever quotes a part of it should use clip, so that the rest is seen.
const maxMessage = 512

// failure is an answer that an errs.Code does not say by itself.
type failure struct {
	status     int
	msg        string
	errorCode  string
	retryAfter time.Duration
	err        error // logged, never shown; may be nil
}

func (f *failure) Error() string {
	if f.err == nil {
		return f.msg
	}
	return f.msg + ": " + f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

func fail(status int, format string, args ...any) *failure {
	return &failure{status: status, msg: fmt.Sprintf(format, args...)}
}

// failureOf tells what the client hears about err.
func failureOf(err error) *failure {
	if f, ok := errors.AsType[*failure](err); ok {
		return f
	}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return fail(http.StatusRequestEntityTooLarge, "Request body is larger than %d bytes", tooLarge.Limit)
	}
	f := &failure{status: statuses[errs.CodeOf(err)], msg: errs.Message(err), err: err}
	if f.status == http.StatusInternalServerError && errors.Is(err, context.DeadlineExceeded) {
		f.status, f.msg = http.StatusGatewayTimeout, "The request took too long"
	}
	if f.status == http.StatusTooManyRequests || f.status == http.StatusServiceUnavailable {
		f.retryAfter = time.Second
	}
	return f
}

// body is the failure as clients see it.
func (f *failure) body() gen.Error {
	return gen.Error{Code: int32(f.status), Message: clipTo(f.msg, maxMessage), ErrorCode: optional(f.errorCode)}
}

// writeError is the one place where errors become answers. The client sees the message, the log the chain.
func (h *handler) writeError(w http.ResponseWriter, r *http.Request, err error) {
	f := failureOf(err)
	h.logFailure(r.Context(), f, err)
	if rec, ok := w.(*recorder); ok && rec.status != 0 {
		panic(http.ErrAbortHandler) // the answer has begun: a reset is the only honest end
	}
	data, jsonErr := json.Marshal(f.body())
	if jsonErr != nil {
		panic("BUG: encode error body: " + jsonErr.Error())
	}
	header := w.Header()
	header.Set("Content-Type", "application/json; charset=utf-8")
	if f.retryAfter > 0 {
		header.Set("Retry-After", strconv.Itoa(wholeSeconds(f.retryAfter))) // SDKs only understand whole seconds
	}
	w.WriteHeader(f.status)
	_, _ = w.Write(append(data, '\n'))
}

// logFailure logs what an operator should see: our faults, and parts that did not answer. What clients did wrong is counted only,
// and so is a client that went away.
func (h *handler) logFailure(ctx context.Context, f *failure, err error) {
	if f.status < 500 || errors.Is(ctx.Err(), context.Canceled) {
		return
	}
	fields := []zap.Field{zap.String("operation", callOf(ctx).operation), zap.Int("status", f.status), zap.Error(err)}
	switch f.status {
	case http.StatusInternalServerError:
		h.log.Error("request failed", fields...)
	case http.StatusNotImplemented:
	default:
		h.log.Warn("request refused", fields...)
	}
}

// badRequest answers for the generated code when a body does not fit its Go type, which is what validation let through.
func (h *handler) badRequest(w http.ResponseWriter, r *http.Request, err error) {
	h.writeError(w, r, fail(http.StatusBadRequest, "Error when parsing request: %s", clip(err.Error())))
}

// badParameter answers for the generated code when a parameter does not fit its Go type.
func (h *handler) badParameter(w http.ResponseWriter, r *http.Request, err error) {
	h.writeError(w, r, fail(http.StatusBadRequest, "validation error: %s", clip(err.Error())))
}

// wholeSeconds rounds up, to at least one.
func wholeSeconds(d time.Duration) int {
	return max(1, int((d+time.Second-1)/time.Second))
}
