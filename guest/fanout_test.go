package guest

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/sluice-edge/sluice/guest/gen/process"
)

func chunk() *process.ProcessEvent_DataEvent { return &process.ProcessEvent_DataEvent{} }

// A lone reader that stops reading stops the process, for ever if need be, and loses nothing.
func TestLoneSlowReaderIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFanout()
		r := f.subscribe()
		var sent int
		go func() {
			for range 3 * subscriberQueue {
				f.publish(chunk())
				sent++
			}
			f.close()
		}()
		time.Sleep(24 * time.Hour)
		if synctest.Wait(); sent != subscriberQueue {
			t.Errorf("%d chunks were taken in, want %d", sent, subscriberQueue)
		}
		got := 0
		for got < 3*subscriberQueue {
			<-r.queue
			got++
		}
		<-f.done
		f.unsubscribe(r)
	})
}

// With another reader there, the one that does not read is cut off after its budget, and the other goes on.
func TestSlowReaderIsCutOffForOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFanout()
		slow, fast := f.subscribe(), f.subscribe()
		begin := time.Now()
		got := 0
		go func() {
			for range fast.queue {
				got++
			}
		}()
		for range 10 * subscriberQueue {
			f.publish(chunk())
		}
		if took := time.Since(begin); took != stallBudget {
			t.Errorf("the fast reader was held up for %v, want %v", took, stallBudget)
		}
		select {
		case <-slow.cut:
		default:
			t.Error("the slow reader is not cut off")
		}
		if synctest.Wait(); got != 10*subscriberQueue {
			t.Errorf("the fast reader got %d", got)
		}
		close(fast.queue)
		f.unsubscribe(slow)
		f.unsubscribe(fast)
	})
}

// A reader that takes a little now and then cannot hold up the others for ever either: waits add up until it has caught up.
func TestTricklingReaderIsCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFanout()
		slow, fast := f.subscribe(), f.subscribe()
		stop := make(chan struct{})
		go func() {
			for range fast.queue {
			}
		}()
		go func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(stallBudget / 5):
					<-slow.queue
				}
			}
		}()
		begin := time.Now()
		for range 10 * subscriberQueue {
			f.publish(chunk())
		}
		if took := time.Since(begin); took > stallBudget {
			t.Errorf("the fast reader was held up for %v", took)
		}
		close(stop)
		close(fast.queue)
		f.unsubscribe(slow)
		f.unsubscribe(fast)
	})
}

// Somebody who joins while the process waits for a lone slow reader sets the clock going.
func TestJoiningEndsTheWaitForASlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFanout()
		slow := f.subscribe()
		published := make(chan struct{})
		go func() {
			for range subscriberQueue + 1 {
				f.publish(chunk())
			}
			close(published)
		}()
		time.Sleep(time.Hour)
		begin := time.Now()
		fast := f.subscribe()
		<-published
		if took := time.Since(begin); took != stallBudget {
			t.Errorf("waited for %v more", took)
		}
		f.publish(chunk())
		<-fast.queue
		f.unsubscribe(slow)
		f.unsubscribe(fast)
	})
}

func TestReaderThatLeavesFreesTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFanout()
		r := f.subscribe()
		go func() {
			time.Sleep(time.Minute)
			f.unsubscribe(r)
		}()
		for range 3 * subscriberQueue {
			f.publish(chunk())
		}
		f.close()
		f.publish(chunk()) // late output goes nowhere
	})
}
