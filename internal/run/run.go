// Package run ties the lifetimes of a program's parts together.
package run

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

// Group runs actors side by side: the first one to return stops the others, and Run waits for all of them. The zero value
// is ready to use. It is filled before Run and not changed afterwards.
type Group struct {
	actors []actor
}

type actor struct {
	name string
	run  func(context.Context) error
}

// Add adds a part. Its run function blocks until its context ends or it cannot go on, and returns only when everything that
// it started is done. The name goes into its error.
func (g *Group) Add(name string, run func(context.Context) error) {
	g.actors = append(g.actors, actor{name, run})
}

// Run starts every actor and blocks until all have returned. It returns nil when the stop came from ctx and every actor
// ended cleanly, otherwise the errors joined, the cause first.
func (g *Group) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex
		errs []error
	)
	for _, a := range g.actors {
		wg.Go(func() {
			err := a.run(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil && !(ctx.Err() != nil && errors.Is(err, context.Canceled)) {
				errs = append(errs, fmt.Errorf("%s: %w", a.name, err))
			}
			cancel()
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
