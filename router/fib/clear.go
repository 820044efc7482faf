package fib

import (
	"context"
	"errors"
	"fmt"
)

// Clear removes all of our routes, groups and nexthop objects, and returns their number.
func Clear(ctx context.Context, d Driver) (removed int, err error) {
	s, err := d.Observe(ctx)
	if err != nil {
		return 0, fmt.Errorf("reading routes: %w", err)
	}
	var ops []Op
	for _, r := range s.Routes {
		ops = append(ops, Op{Kind: DeleteRoute, Key: r.Key})
	}
	for _, g := range s.Groups {
		ops = append(ops, Op{Kind: DeleteGroup, ID: g.ID})
	}
	for _, o := range s.NextHops {
		ops = append(ops, Op{Kind: DeleteNextHop, ID: o.ID})
	}
	errs := d.Execute(ctx, ops)
	removed = len(ops)
	for _, e := range errs {
		if e != nil {
			removed--
		}
	}
	return removed, errors.Join(errs...)
}
