package nftables

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Divert redirects the ESP packets in UDP for this node (RFC 3948) to another UDP port of the
// node. It uses a table of its own, after NAT: replies to a translated flow that left from port
// 4500 are not for this node. IKE, which shares the port, is not redirected.
//
// The rule works only while a set holds an element that expires unless it is refreshed: should the
// process die, the packets take their usual path a few seconds later.
type Divert struct {
	// NetNS is a file descriptor of the network namespace. Default: that of the calling thread.
	NetNS int

	stop func() // stops the refresh of the element; nil: nothing is diverted
}

const (
	divertTable   = tableName + "-esp"
	divertLife    = 4 * time.Second
	divertRefresh = divertLife / 4
)

// To diverts ESP to a port. With 0 it ends a diversion, also one of a former process.
func (d *Divert) To(port uint16) error {
	if d.stop != nil {
		d.stop()
		d.stop = nil
	}
	c, err := d.open()
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	t := &nftables.Table{Name: divertTable, Family: nftables.TableFamilyINet}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	var alive *nftables.Set
	if port != 0 {
		if alive, err = addDiversion(c, t, port); err != nil {
			return err
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("diverting ESP to port %d: %w", port, err)
	}
	if port != 0 {
		d.stop = d.refresh(alive)
	}
	return nil
}

// Clear removes the diversion of a process that died, and reports whether there was one.
func (d *Divert) Clear() (bool, error) {
	c, err := d.open()
	if err != nil {
		return false, fmt.Errorf("opening a netlink socket: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("reading tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == divertTable }) {
		return false, nil
	}
	return true, d.To(0)
}

func (d *Divert) open() (*nftables.Conn, error) {
	if d.NetNS != 0 {
		return nftables.New(nftables.WithNetNSFd(d.NetNS))
	}
	return nftables.New()
}

func addDiversion(c *nftables.Conn, t *nftables.Table, port uint16) (*nftables.Set, error) {
	const natPort = 4500
	c.AddTable(t)
	alive := &nftables.Set{Table: t, Name: "alive", KeyType: nftables.TypeInetProto, HasTimeout: true}
	if err := c.AddSet(alive, aliveElement()); err != nil {
		return nil, fmt.Errorf("diverting ESP to port %d: %w", port, err)
	}
	arrival := c.AddChain(&nftables.Chain{
		Name: "arrival", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10),
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: arrival, Exprs: exprs(
		// UDP, while the element lives
		meta(expr.MetaKeyL4PROTO, reg1), &expr.Lookup{SourceRegister: reg1, SetName: alive.Name},
		transport(2, 2, reg1), compare(expr.CmpOpEq, binaryutil.BigEndian.PutUint16(natPort)...),
		transport(8, 4, reg1), compare(expr.CmpOpNeq, 0, 0, 0, 0), // the Non-ESP Marker of IKE
		&expr.Fib{Register: reg1, ResultADDRTYPE: true, FlagDADDR: true},
		compare(expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)...),
		&expr.Immediate{Register: reg1, Data: binaryutil.BigEndian.PutUint16(port)},
		// ESP in UDP needs no checksum (RFC 3948 section 2.1), so none has to be updated.
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	)})
	return alive, nil
}

func aliveElement() []nftables.SetElement {
	return []nftables.SetElement{{Key: []byte{unix.IPPROTO_UDP}, Timeout: divertLife}}
}

// refresh refreshes the element of the set until stop is called.
func (d *Divert) refresh(alive *nftables.Set) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(divertRefresh)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			// The next tick repairs a failure; if the element has expired for good, the next call
			// of To does.
			_ = d.renew(alive)
		}
	})
	return func() { close(done); wg.Wait() }
}

func (d *Divert) renew(alive *nftables.Set) error {
	c, err := d.open()
	if err != nil {
		return err
	}
	// One transaction: no packet sees the set empty.
	c.FlushSet(alive)
	err = c.SetAddElements(alive, aliveElement())
	return errors.Join(err, c.Flush())
}
