package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/sluice-edge/sluice/internal/pidfd"
)

// Process is a running sandbox. All of its methods may be called from any goroutine.
type Process struct {
	// Fixed after it was made.
	handle Handle
	pidfd  *os.File
	done   chan struct{} // closed by watch
	log    *os.File      // the agent's; nil for an adopted one

	mu     sync.Mutex // guards the fields below
	commit *os.File   // write end of the watchdog's pipe; nil once committed, and for an adopted one
	err    error
}

// Handle is what to write down, before Commit.
func (p *Process) Handle() Handle { return p.handle }

// Done is closed when the sandbox's first process is gone, and with it every other.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the sandbox ended: nil while it runs. An adopted sandbox is not our child, so its status is not known.
func (p *Process) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Commit says that the Handle is on record. Until then the sandbox dies with this process, however that ends; afterwards
// it survives it. Idempotent.
func (p *Process) Commit() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.commit == nil {
		return nil
	}
	_, err := p.commit.Write([]byte{1})
	err = errors.Join(err, p.commit.Close())
	p.commit = nil
	if err != nil {
		return fmt.Errorf("commit sandbox: %w", err)
	}
	return nil
}

// Kill ends the sandbox and waits until it is gone. A sandbox that has ended already is no error.
func (p *Process) Kill(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := pidfd.Signal(p.pidfd, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill sandbox: %w", err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for the end of a killed sandbox: %w", context.Cause(ctx))
	}
}

// Release stops watching the sandbox without ending it, as if this process had been replaced: for a daemon that shuts
// down and leaves its sandboxes running. One that was not committed dies.
func (p *Process) Release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.pidfd.Close()
	if p.commit != nil {
		err = errors.Join(err, p.commit.Close())
		p.commit = nil
	}
	return err
}

// held is what the daemon holds of a sandbox that it has started itself; nil in an adopted one.
type held struct {
	commit *os.File // write end of the watchdog's pipe
	log    *os.File
}

// newProcess watches a process in one goroutine that waits in the network poller, not in a thread.
func newProcess(h Handle, process *os.File, held held) *Process {
	p := &Process{handle: h, pidfd: process, commit: held.commit, log: held.log, done: make(chan struct{})}
	go p.watch()
	return p
}

func (p *Process) watch() {
	if p.log != nil {
		defer p.log.Close()
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return // released before it began
	}
	var end error
	err = raw.Read(func(fd uintptr) bool {
		over, how := pidfd.Reap(int(fd))
		end = fmt.Errorf("%w: guestd %s", errGone, how)
		return over
	})
	if err != nil {
		return // released
	}
	if p.log != nil {
		if text := lastSaid(p.log); text != "" {
			end = fmt.Errorf("%w, having said %q", end, text)
		}
	}
	p.mu.Lock()
	p.err = end
	if p.commit != nil {
		p.commit.Close() // nothing is left to guard; the watchdog goes home
		p.commit = nil
	}
	p.mu.Unlock()
	p.pidfd.Close()
	close(p.done)
}

var errGone = errors.New("sandbox ended")
