package routing

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/zap"
)

// queueLength is how many messages may wait for the watcher. We read the subscription ourselves instead of through go-redis's
// channel, which drops when it is full: when this queue is full we stop reading, Redis's own buffer fills, and Redis
// cuts the connection, which we see.
const queueLength = 4096

// resubscribeDelay is the pause after a failed or lost subscription.
const resubscribeDelay = 250 * time.Millisecond

var errSilent = errors.New("no heartbeat came back")

// Watch implements Store. Pub/sub is a hint, with three ways to fail that a client does not see by itself: a connection
// that is open and dead, a subscription on a server that was demoted, and one that the client library renewed behind our back.
// So every second it publishes to a channel of its own and wants that message back on the same connection.
func (s *RedisStore) Watch(ctx context.Context, emit func(Event)) error {
	works := true
	for ctx.Err() == nil {
		works = s.listen(ctx, emit, works)
	}
	return nil
}

// listen is one subscription from beginning to end, and the pause after it. Whether subscriptions work, which a heartbeat proves, is
// logged when it changes: a line per attempt would fill the log for as long as Redis is away.
func (s *RedisStore) listen(ctx context.Context, emit func(Event), works bool) (worked bool) {
	heard := false
	err := s.subscribeOnce(ctx, func(e Event) {
		heard = true
		if e.Kind == Heartbeat && !works {
			works = true
			s.log.Info("route subscription is back")
		}
		emit(e)
	})
	if ctx.Err() != nil {
		return works
	}
	switch {
	case !heard:
		s.log.Debug("route subscription not made", zap.Error(err))
	case errors.Is(err, errSilent):
		s.silences.Inc()
	default:
		s.drops.Inc()
	}
	if works {
		s.log.Warn("route subscription lost, known routes are suspect", zap.Error(err))
	}
	if heard {
		emit(Event{Kind: Lost})
	}
	select {
	case <-ctx.Done():
	case <-time.After(resubscribeDelay):
	}
	return false
}

// subscribeOnce listens on one connection until it fails, falls silent, or ctx ends.
func (s *RedisStore) subscribeOnce(ctx context.Context, emit func(Event)) error {
	ctx, cancel := context.WithCancel(ctx)
	started := time.Now()
	own := heartbeatPrefix + rand.Text()
	sub := s.client.Subscribe(ctx)
	var jobs sync.WaitGroup
	defer jobs.Wait()
	defer sub.Close() // the connection is being thrown away
	defer cancel()
	if err := sub.Subscribe(ctx, changesChannel, own); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}

	received := make(chan any, queueLength) // sent and closed by the job that receives
	var receiveErr error                    // written before the channel is closed
	jobs.Go(func() {
		defer close(received)
		receiveErr = receive(ctx, sub, received)
	})
	silence := time.NewTimer(SilenceLimit)
	defer silence.Stop()
	confirmed := 0
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-silence.C:
			return errSilent
		case m, ok := <-received:
			if !ok {
				return receiveErr
			}
			switch m := m.(type) {
			case *redis.Subscription:
				confirmed++
				if confirmed > 2 {
					return errors.New("the client subscribed anew by itself")
				}
				if confirmed == 2 {
					emit(Event{Kind: Lost})
					jobs.Go(func() { s.beat(ctx, own, started) })
				}
			case *redis.Message:
				if m.Channel != own {
					emitChange(m.Payload, emit)
					continue
				}
				sent, err := strconv.ParseInt(m.Payload, 10, 64)
				if err != nil {
					continue // somebody else's idea of a heartbeat proves nothing
				}
				at := started.Add(time.Duration(sent))
				s.roundTrip.UpdateDuration(at)
				silence.Reset(SilenceLimit - min(time.Since(at), SilenceLimit))
				emit(Event{Kind: Heartbeat, At: at})
			}
		}
	}
}

func emitChange(payload string, emit func(Event)) {
	if id, ok := strings.CutPrefix(payload, routeMessage); ok {
		emit(Event{Kind: RouteChanged, Key: id})
		return
	}
	if id, ok := strings.CutPrefix(payload, nodeMessage); ok {
		emit(Event{Kind: NodeChanged, Key: id})
		return
	}
	emit(Event{Kind: Lost}) // a newer writer says something that we do not understand
}

// receive moves what comes from the subscription into the queue, and waits when that is full.
func receive(ctx context.Context, sub *redis.PubSub, received chan<- any) error {
	for {
		m, err := sub.Receive(ctx)
		if err != nil {
			return fmt.Errorf("receive: %w", err)
		}
		select {
		case received <- m:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// beat publishes how long after started it is, by this process's monotonic clock, at once and then every second. One that
// fails is not repeated: its absence is what the watcher listens for.
func (s *RedisStore) beat(ctx context.Context, channel string, started time.Time) {
	tick := time.NewTicker(HeartbeatInterval)
	defer tick.Stop()
	for {
		beatCtx, cancel := context.WithTimeout(ctx, SilenceLimit)
		err := s.client.Publish(beatCtx, channel, int64(time.Since(started))).Err()
		cancel()
		if err != nil && ctx.Err() == nil {
			s.log.Debug("heartbeat not sent", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
