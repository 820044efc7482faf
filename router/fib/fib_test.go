package fib

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"
)

// start runs a FIB on a kernel until the test ends.
func start(t *testing.T, k *fakeKernel) *FIB {
	f := New(k, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- f.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	return f
}

func settle(t *testing.T, f *FIB) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	err := f.Wait(ctx)
	if ctx.Err() != nil {
		t.Fatal(err)
	}
	return err
}

func TestRunHealsWhatOthersDelete(t *testing.T) {
	k := newFakeKernel()
	k.links["a"] = Link{"a", 7, true}
	f := start(t, k)
	f.Update([]Route{{Key: key("10.0.0.0/24"), NextHops: []NextHop{hop("a")}}})
	f.Synced()
	if err := settle(t, f); err != nil {
		t.Fatal(err)
	}
	for !k.watched() {
		time.Sleep(time.Millisecond)
	}
	k.setLink(Link{Name: "a"})
	settle(t, f)
	k.setLink(Link{"a", 8, true})
	settle(t, f)
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.routes[key("10.0.0.0/24")].NextHop
	if m := k.groups[id]; len(m) != 1 || k.objects[m[0]].Link != 8 {
		t.Errorf("kernel: %+v", k.state())
	}
}

func (k *fakeKernel) watched() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.notify != nil
}

func TestRunGoesOnAfterAFailure(t *testing.T) {
	k := newFakeKernel()
	k.links["a"] = Link{"a", 7, true}
	occupied := key("10.0.9.0/24")
	k.foreign[occupied] = true
	f := start(t, k)
	f.Update([]Route{
		{Key: occupied, NextHops: []NextHop{hop("a")}},
		{Key: key("10.0.0.0/24"), NextHops: []NextHop{hop("a")}},
	})
	f.Synced()
	if err := settle(t, f); err == nil {
		t.Fatal("a route that cannot be added makes no error")
	}
	for _, r := range f.Routes() {
		if r.Installed == (r.Key == occupied) {
			t.Errorf("state %+v", r)
		}
	}
	k.mu.Lock()
	delete(k.foreign, occupied)
	k.mu.Unlock()
	for deadline := time.Now().Add(time.Minute); f.Err() != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(f.Err())
		}
	}
	if got := k.route(occupied); got.NextHop == 0 {
		t.Error("the failed route was not tried again")
	}
}

func (k *fakeKernel) route(key Key) Installed {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.routes[key]
}

// blindKernel cannot be read.
type blindKernel struct{ *fakeKernel }

func (blindKernel) Observe(context.Context) (State, error) { return State{}, errors.New("no answer") }

func TestRunWritesNothingWhileBlind(t *testing.T) {
	k := newFakeKernel()
	k.routes[key("10.0.0.0/24")] = Installed{Key: key("10.0.0.0/24"), Blackhole: true}
	f := New(blindKernel{k}, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go f.Run(ctx)
	f.Synced()
	if err := settle(t, f); err == nil {
		t.Error("no error")
	}
	if k.Writes() > 0 {
		t.Error("written without having read")
	}
}
