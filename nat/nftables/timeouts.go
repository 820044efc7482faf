package nftables

import (
	"fmt"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/nat"
)

// timedInfix occurs in the names of chains that set timeouts.
const timedInfix = "-for"

// timed returns the verdict for flows with timeouts: the given one, or a goto to a chain that sets
// the timeouts first.
func (r *ruleset) timed(t nat.Timeouts, name string, kind int32, chainName string) (int32, string) {
	if t == (nat.Timeouts{}) {
		return kind, chainName
	}
	name += timedInfix
	for _, object := range timeouts(t) {
		name += "-" + timeoutName(object)
	}
	r.chains[name] = &chain{rules: append(r.setTimeouts(t), exprs(verdict(expr.VerdictKind(kind), chainName)))}
	return gotoTo, name
}

// setTimeouts returns the rules that assign timeouts to a flow.
func (r *ruleset) setTimeouts(t nat.Timeouts) (rules [][]expr.Any) {
	for _, object := range timeouts(t) {
		id := timeoutName(object)
		r.timeouts[id] = object
		rules = append(rules, exprs(&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: id}))
	}
	return rules
}

// timeouts returns the timeout objects of a policy. An object has no effect on packets of other
// protocols. It is complete: values that the policy does not set are the kernel's defaults
// (nf_conntrack_proto_tcp.c, nf_conntrack_proto_udp.c).
func timeouts(t nat.Timeouts) (objects []*expr.CtTimeout) {
	seconds := func(d time.Duration, standard uint32) uint32 {
		if d == 0 {
			return standard
		}
		return uint32(d / time.Second)
	}
	if t.TCPEstablished != 0 || t.TCPClosing != 0 {
		objects = append(objects, &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_TCP, Policy: expr.CtStatePolicyTimeout{
			expr.CtStateTCPSYNSENT: 120, expr.CtStateTCPSYNRECV: 60, expr.CtStateTCPSYNSENT2: 120,
			expr.CtStateTCPESTABLISHED: seconds(t.TCPEstablished, 432000),
			expr.CtStateTCPFINWAIT:     seconds(t.TCPClosing, 120), expr.CtStateTCPCLOSEWAIT: seconds(t.TCPClosing, 60),
			expr.CtStateTCPLASTACK: seconds(t.TCPClosing, 30), expr.CtStateTCPTIMEWAIT: seconds(t.TCPClosing, 120),
			expr.CtStateTCPCLOSE: 10, expr.CtStateTCPRETRANS: 300, expr.CtStateTCPUNACK: 300,
		}})
	}
	if t.UDP != 0 || t.UDPStream != 0 {
		objects = append(objects, &expr.CtTimeout{L3Proto: unix.NFPROTO_IPV4, L4Proto: unix.IPPROTO_UDP, Policy: expr.CtStatePolicyTimeout{
			expr.CtStateUDPUNREPLIED: seconds(t.UDP, 30), expr.CtStateUDPREPLIED: seconds(t.UDPStream, 120),
		}})
	}
	return objects
}

// timeoutName returns a name with all values of an object, because the kernel cannot change an
// object, and flows lose their timeouts when their object is deleted.
func timeoutName(t *expr.CtTimeout) string {
	if t.L4Proto == unix.IPPROTO_UDP {
		return fmt.Sprintf("udp-%d-%d", t.Policy[expr.CtStateUDPUNREPLIED], t.Policy[expr.CtStateUDPREPLIED])
	}
	return fmt.Sprintf("tcp-%d-%d-%d-%d", t.Policy[expr.CtStateTCPESTABLISHED], t.Policy[expr.CtStateTCPFINWAIT], t.Policy[expr.CtStateTCPCLOSEWAIT], t.Policy[expr.CtStateTCPLASTACK])
}
