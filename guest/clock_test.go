package guest

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// A restored machine takes its time for the first call: then its clock is set again, to the time that it is when that works at once.
func TestClockAfterASlowCall(t *testing.T) {
	type told struct {
		Path      string
		Timestamp time.Time
	}
	check := func(name string, took []time.Duration, wantPaths ...string) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var calls []told
				client := NewClientDial(func(context.Context) (net.Conn, error) {
					ours, theirs := net.Pipe()
					go func() {
						defer theirs.Close()
						req, err := http.ReadRequest(bufio.NewReader(theirs))
						if err != nil {
							t.Error(err)
							return
						}
						call := told{Path: req.URL.Path}
						if err := json.NewDecoder(req.Body).Decode(&call); err != nil {
							t.Error(err)
						}
						time.Sleep(took[len(calls)])
						calls = append(calls, call)
						_, _ = io.WriteString(theirs, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
					}()
					return ours, nil
				})
				if err := client.Resume(t.Context(), ResumeRequest{Timestamp: time.Now()}); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				now := time.Now()
				for i, want := range wantPaths {
					if i >= len(calls) || calls[i].Path != want {
						t.Fatalf("calls are %+v, want %q", calls, wantPaths)
					}
				}
				if last := calls[len(calls)-1]; len(calls) != len(wantPaths) || now.Sub(last.Timestamp) != took[len(calls)-1] {
					t.Errorf("at %v calls are %+v, want %q", now, calls, wantPaths)
				}
			})
		})
	}
	check("quick", []time.Duration{time.Millisecond}, "/resume")
	check("slow", []time.Duration{3 * time.Second, time.Millisecond}, "/resume", "/clock")
	check("slow twice", []time.Duration{3 * time.Second, 2 * time.Second, 0}, "/resume", "/clock", "/clock")
}
