// Package errs holds the one error type that crosses package boundaries. Everything else is a plain wrapped error and
// means Internal. Every package may import it; it imports nothing of this module.
package errs

import (
	"errors"
	"fmt"
)

// Code is the meaning of an error, from a closed list. Each listener maps it to its own status by one table.
type Code uint8

// The closed list. The zero value is Internal, so an error that nobody classified is never mistaken for the caller's fault.
const (
	Internal    Code = iota // our fault; the caller learns nothing but that
	Invalid                 // the caller's input is wrong; the message names the input and the remedy
	NotFound                // no such thing, or not visible to this caller
	Denied                  // the caller is known or unknown, and may not
	Conflict                // the thing is in a state that forbids this now
	Exhausted               // a limit was reached
	Unavailable             // a part that is needed does not answer; the same call may work later
)

var codeNames = [...]string{"internal", "invalid", "not_found", "denied", "conflict", "exhausted", "unavailable"}

// String is the label used in logs and metrics.
func (c Code) String() string {
	if int(c) < len(codeNames) {
		return codeNames[c]
	}
	return "internal"
}

// Error is an error whose meaning is known where it was made.
type Error struct {
	Code Code
	Msg  string // shown to the caller: no address, path or secret
	Err  error  // logged, never shown; may be nil
}

// New returns an Error without a cause. The message is formatted as by fmt.Sprintf and is shown to the caller.
func New(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Msg: fmt.Sprintf(format, args...)}
}

// Error is the text for logs: the message and the cause.
func (e *Error) Error() string {
	if e.Err == nil {
		return e.Msg
	}
	return e.Msg + ": " + e.Err.Error()
}

// Unwrap returns the cause, for errors.Is and errors.As.
func (e *Error) Unwrap() error { return e.Err }

// CodeOf returns the code of the outermost Error in err's chain, and Internal when there is none.
func CodeOf(err error) Code {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Code
	}
	return Internal
}

// Message returns what the caller may be shown: the message of the outermost Error, or a constant that tells nothing.
func Message(err error) string {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Msg
	}
	return "internal error"
}
