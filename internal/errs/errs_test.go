package errs

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestCodeAndMessage(t *testing.T) {
	cause := io.ErrUnexpectedEOF
	wrapped := fmt.Errorf("create: %w", &Error{Code: Invalid, Msg: "timeout must be positive", Err: cause})
	tests := []struct {
		err  error
		code Code
		msg  string
	}{
		{nil, Internal, "internal error"},
		{errors.New("open /secret/path"), Internal, "internal error"},
		{wrapped, Invalid, "timeout must be positive"},
		{New(NotFound, "no sandbox %q", "x"), NotFound, `no sandbox "x"`},
	}
	for _, tt := range tests {
		if got := CodeOf(tt.err); got != tt.code {
			t.Errorf("CodeOf(%v) = %v, want %v", tt.err, got, tt.code)
		}
		if got := Message(tt.err); got != tt.msg {
			t.Errorf("Message(%v) = %q, want %q", tt.err, got, tt.msg)
		}
	}
	if !errors.Is(wrapped, cause) {
		t.Error("the cause is lost in the chain")
	}
	if got := Code(200).String(); got != "internal" {
		t.Errorf("String of an unknown code = %q, want internal", got)
	}
}
