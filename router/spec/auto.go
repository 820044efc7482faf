package spec

import "net/netip"

// Auto stands in a document for an address that the platform reports.
const Auto = "auto"

// Platform has the addresses that a document may refer to with Auto.
type Platform struct {
	// Known is true when the platform has answered.
	Known bool
	// Interfaces has the primary address of each kernel interface.
	Interfaces map[string]netip.Addr
	// Public has the public address of each address that the platform translates one to one.
	Public map[netip.Addr]netip.Addr
}

// On returns the document with the addresses that Auto stands for.
func (d Document) On(p Platform) Document {
	d.platform = p
	return d
}

// Over returns the document with a function that returns the MTU of an interface, 0 if it is
// unknown.
func (d Document) Over(mtu func(iface string) int) Document {
	d.mtu = mtu
	return d
}

// With returns the document with the number of processors of its machine.
func (d Document) With(processors int) Document {
	d.processors = processors
	return d
}

// The default MTU of the underlay: paths through the Internet are not larger, also where the
// interface is, as with 9001 bytes in AWS. A smaller one than the least cannot be given.
const leastMTU, mostMTU = 1280, 1500

// DefaultMTU returns the default of underlay.mtu on an interface with an MTU; 0: it is unknown.
func DefaultMTU(ofInterface int) int {
	if ofInterface == 0 {
		return mostMTU
	}
	return min(max(ofInterface, leastMTU), mostMTU)
}

const (
	unknownFacts = "is unknown, because no platform reported this machine's addresses"
	knownHow     = "give the address itself, or start isthmusd with -platform auto on AWS, Azure or Google Cloud"
)

// autoAddress returns the primary address of an interface.
func (c *checker) autoAddress(path, iface string) (netip.Addr, bool) {
	if !c.platform.Known {
		c.Problem(path, Auto, unknownFacts, knownHow)
		return netip.Addr{}, false
	}
	a, ok := c.platform.Interfaces[iface]
	if !ok {
		c.Problem(path, Auto, "is unknown, because the platform reports no interface "+iface, "give the address itself; `isthmus get status -o json` shows what the platform reports")
	}
	return a, ok
}

// autoPublic returns the public address of an address.
func (c *checker) autoPublic(path string, of netip.Addr) (netip.Addr, bool) {
	if !c.platform.Known {
		c.Problem(path, Auto, unknownFacts, knownHow)
		return netip.Addr{}, false
	}
	a, ok := c.platform.Public[of]
	if !ok && of.IsValid() {
		c.Problem(path, Auto, "is unknown, because the platform reports no public address for "+of.String(), "associate one in the cloud, or give the address itself; `isthmus get status -o json` shows what the platform reports")
	}
	return a, ok
}
