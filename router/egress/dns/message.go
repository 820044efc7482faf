package dns

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// maxUDP is a UDP message size that passes all networks (RFC 9715 section 3.1).
const maxUDP = 1232

// pack returns a query.
func pack(id uint16, name string, ipv6 bool) ([]byte, error) {
	n, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return nil, err
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: id, RecursionDesired: true})
	kind := dnsmessage.TypeA
	if ipv6 {
		kind = dnsmessage.TypeAAAA
	}
	var opt dnsmessage.ResourceHeader
	err = errors.Join(
		b.StartQuestions(), b.Question(dnsmessage.Question{Name: n, Type: kind, Class: dnsmessage.ClassINET}),
		b.StartAdditionals(), opt.SetEDNS0(maxUDP, dnsmessage.RCodeSuccess, false), b.OPTResource(opt, dnsmessage.OPTResource{}))
	if err != nil {
		return nil, err
	}
	return b.Finish()
}

// question returns the header and the only question of a message.
func question(message []byte) (dnsmessage.Header, dnsmessage.Question, error) {
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil {
		return h, dnsmessage.Question{}, err
	}
	q, err := p.AllQuestions()
	if err == nil && len(q) != 1 {
		err = fmt.Errorf("it has %d questions", len(q))
	}
	if err != nil {
		return h, dnsmessage.Question{}, err
	}
	return h, q[0], nil
}

// canonical returns a name in lower case without its final dot.
func canonical(n dnsmessage.Name) string {
	return strings.ToLower(strings.TrimSuffix(n.String(), "."))
}

// answer is the content of a response for one name.
type answer struct {
	addrs []netip.Addr
	ttl   time.Duration // the shortest of the chain
	next  string        // end of a chain of aliases without addresses; empty: none
}

// read returns the answer in a response, following all aliases that the response contains.
func read(message []byte) (answer, error) {
	var a answer
	var p dnsmessage.Parser
	h, err := p.Start(message)
	if err != nil {
		return a, err
	}
	q, err := p.Question()
	if err != nil {
		return a, err
	}
	if err := p.SkipAllQuestions(); err != nil {
		return a, err
	}
	type set struct {
		addrs []netip.Addr
		alias string
		ttl   uint32
	}
	sets := map[string]*set{}
	for {
		r, err := p.AnswerHeader()
		if errors.Is(err, dnsmessage.ErrSectionDone) {
			break
		}
		if err != nil {
			return a, err
		}
		if r.Class != dnsmessage.ClassINET || r.Type != q.Type && r.Type != dnsmessage.TypeCNAME {
			if err := p.SkipAnswer(); err != nil {
				return a, err
			}
			continue
		}
		s := sets[canonical(r.Name)]
		if s == nil {
			s = &set{ttl: r.TTL}
			sets[canonical(r.Name)] = s
		}
		s.ttl = min(s.ttl, r.TTL)
		switch r.Type {
		case dnsmessage.TypeA:
			v, err := p.AResource()
			if err != nil {
				return a, err
			}
			s.addrs = append(s.addrs, netip.AddrFrom4(v.A))
		case dnsmessage.TypeAAAA:
			v, err := p.AAAAResource()
			if err != nil {
				return a, err
			}
			s.addrs = append(s.addrs, netip.AddrFrom16(v.AAAA))
		case dnsmessage.TypeCNAME:
			v, err := p.CNAMEResource()
			if err != nil {
				return a, err
			}
			s.alias = canonical(v.CNAME)
		default:
			if err := p.SkipAnswer(); err != nil {
				return a, err
			}
		}
	}
	ttl := uint32(1<<31 - 1) // RFC 2181 section 8
	name := canonical(q.Name)
	for range len(sets) + 1 {
		s := sets[name]
		if s == nil {
			break
		}
		ttl = min(ttl, s.ttl)
		if len(s.addrs) > 0 || s.alias == "" {
			a.addrs = s.addrs
			a.ttl = time.Duration(ttl) * time.Second
			return a, nil
		}
		name = s.alias
	}
	if name != canonical(q.Name) {
		a.ttl = time.Duration(ttl) * time.Second
		if h.RCode == dnsmessage.RCodeSuccess {
			a.next = name
		}
		return a, nil
	}
	return a, nil // No such name or no such record. Without a time to live, the floor applies.
}

// fault returns the code of a response that is a header without a question, and RCodeSuccess
// otherwise.
func fault(response, query []byte) dnsmessage.RCode {
	const header = 12
	if len(response) != header || [2]byte(response) != [2]byte(query) || response[2]&0x80 == 0 || [8]byte(response[4:]) != [8]byte{} {
		return dnsmessage.RCodeSuccess
	}
	return dnsmessage.RCode(response[3] & 0xf)
}

// hasOPT reports whether a message has an OPT record, that is, uses EDNS (RFC 6891 section 6.1.1).
func hasOPT(message []byte) bool {
	var p dnsmessage.Parser
	if _, err := p.Start(message); err != nil || p.SkipAllQuestions() != nil || p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return false
	}
	for {
		h, err := p.AdditionalHeader()
		if err != nil {
			return false
		}
		if h.Type == dnsmessage.TypeOPT {
			return true
		}
		if p.SkipAdditional() != nil {
			return false
		}
	}
}

// withoutOPT returns a query with only its header and its question, or nil if it has no OPT record.
func withoutOPT(query []byte) ([]byte, error) {
	if !hasOPT(query) {
		return nil, nil
	}
	h, q, err := question(query)
	if err != nil {
		return nil, err
	}
	b := dnsmessage.NewBuilder(nil, dnsmessage.Header{ID: h.ID, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, CheckingDisabled: h.CheckingDisabled})
	if err := errors.Join(b.StartQuestions(), b.Question(q)); err != nil {
		return nil, err
	}
	return b.Finish()
}

// nameIn returns the bytes of the name in the question of a message, or nil if it is incomplete.
func nameIn(message []byte) []byte {
	const header = 12
	for i := header; i < len(message); i += 1 + int(message[i]) {
		switch {
		case message[i] == 0:
			return message[header:i]
		case message[i] > 63:
			return nil // a pointer, which has no use in a question
		}
	}
	return nil
}

// mixCase gives each letter of a name a random case, so that an answer with the same case proves
// that its sender saw the query (draft-vixie-dnsext-dns0x20).
func mixCase(name []byte) {
	bits := make([]byte, len(name))
	rand.Read(bits)
	for i := 0; i < len(name); {
		end := min(len(name), i+1+int(name[i]))
		for i++; i < end; i++ {
			if lower := name[i] | 0x20; lower >= 'a' && lower <= 'z' && bits[i]&1 == 1 {
				name[i] ^= 0x20
			}
		}
	}
}
