package ipsec

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/tunnel"
)

// clearPause is how often Clear checks whether the SAs have ended.
const clearPause = 50 * time.Millisecond

// ErrNoCharon means that charon does not listen.
var ErrNoCharon = errors.New("charon does not run")

// Clear removes every connection, key and SA with our mark from charon, and returns how many
// connections and keys there were. It waits until the SAs have ended or ctx is done, because
// charon notifies their peers, and some may not answer. The error is ErrNoCharon when charon does
// not listen. Run must not be active.
func (d *Driver) Clear(ctx context.Context) (removed int, err error) {
	if _, err := d.client.current(); errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return 0, ErrNoCharon
	} else if err != nil {
		return 0, err
	}
	conns, err := d.client.call(ctx, "get-conns", nil)
	if err != nil {
		return 0, err
	}
	keys, err := d.client.call(ctx, "get-shared", nil)
	if err != nil {
		return 0, err
	}
	all := slices.Concat(texts(conns, "conns"), texts(keys, "keys"))
	all = slices.DeleteFunc(all, func(name string) bool { return !strings.HasPrefix(name, tunnel.Mark) })
	removed = len(all)
	sas, err := d.marked(ctx)
	if err != nil {
		return 0, err
	}
	names := slices.Concat(all, sas)
	slices.Sort(names)
	var errs []error
	for _, name := range slices.Compact(names) {
		if err := d.Remove(ctx, strings.TrimPrefix(name, tunnel.Mark)); err != nil {
			errs = append(errs, err)
		}
	}
	for len(errs) == 0 {
		if sas, err = d.marked(ctx); err != nil || len(sas) == 0 {
			return removed, err
		}
		select {
		case <-ctx.Done():
			return removed, fmt.Errorf("SAs of %s have not ended", strings.Join(sas, ", "))
		case <-time.After(clearPause):
		}
	}
	return removed, errors.Join(errs...)
}

// marked returns the names of our connections that have an IKE SA.
func (d *Driver) marked(ctx context.Context) (names []string, err error) {
	sas, err := d.client.listSAs(ctx, "")
	if err != nil {
		return nil, err
	}
	for name, ike := range sas {
		if strings.HasPrefix(name, tunnel.Mark) && len(ike) > 0 {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}
