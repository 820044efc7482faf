package spec

import "net/netip"

// Auto stands in a document for an address that the platform tells.
const Auto = "auto"

// Platform is what the platform says of the machine's addresses, as far as a document may ask for it with Auto.
type Platform struct {
	// Known says that the platform has answered.
	Known bool
	// Interfaces has the primary address of each kernel interface.
	Interfaces map[string]netip.Addr
	// Public has the public address of each address that the platform translates one to one.
	Public map[netip.Addr]netip.Addr
}

// On returns the document with what Auto stands for in it.
func (d Document) On(p Platform) Document {
	d.platform = p
	return d
}

const (
	unknownFacts = "cannot be found out, since no platform has told this machine's addresses"
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
		c.Problem(path, Auto, "cannot be found out, since the platform knows no interface "+iface, "give the address itself; `isthmus get status -o json` shows what the platform says")
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
		c.Problem(path, Auto, "cannot be found out, since the platform has no public address for "+of.String(), "associate one in the cloud, or give the address itself; `isthmus get status -o json` shows what the platform says")
	}
	return a, ok
}
