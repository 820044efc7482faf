package platform

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"strings"
)

// google reads the metadata server of Compute Engine (Google Cloud documentation, "VM metadata").
type google struct{ *client }

const flavor = "Metadata-Flavor"

// get sends a request, and accepts an answer only with the header of Google's metadata server.
func (g *google) get(ctx context.Context, at string, limit int) ([]byte, error) {
	body, header, err := g.do(ctx, request{path: at, header: map[string]string{flavor: "Google"}, limit: limit})
	if err == nil && header.Get(flavor) != "Google" {
		err = fmt.Errorf("asking Google Cloud for %s: the answer lacks the header %s: Google, so it is not from the metadata server: look for a proxy at 169.254.169.254", at, flavor)
	}
	return body, err
}

// UserData implements Reader. It is the machine's attribute user-data.
func (g *google) UserData(ctx context.Context) ([]byte, error) {
	body, err := g.get(ctx, "/computeMetadata/v1/instance/attributes/user-data", MaxUserData)
	if errors.Is(err, errMissing) {
		return nil, nil
	}
	return body, err
}

// networkInterface is the used part of an interface.
type networkInterface struct {
	IP            string
	IPv6s         []string
	IPAliases     []string
	MAC           string
	MTU           json.Number
	Gateway       string
	SubnetMask    string
	AccessConfigs []struct{ ExternalIP string }
}

// Facts implements Reader. It requests single fields, because the whole instance includes its
// attributes, and with them the user-data.
func (g *google) Facts(ctx context.Context) (Facts, error) {
	f := Facts{Platform: Google}
	for _, fact := range []struct {
		field string
		into  *string
	}{{"id", &f.Instance}, {"zone", &f.Zone}, {"machine-type", &f.Type}} {
		at := "/computeMetadata/v1/instance/" + fact.field
		body, err := g.get(ctx, at, maxFact)
		if err != nil {
			return Facts{}, err
		}
		if *fact.into, err = oneLine(Google, at, body); err != nil {
			return Facts{}, err
		}
	}
	if f.Instance == "" || strings.Trim(f.Instance, "0123456789") != "" {
		return Facts{}, fmt.Errorf("asking Google Cloud for the instance's id: %q is not a number", short(f.Instance))
	}
	// projects/NUMBER/zones/us-central1-a, projects/NUMBER/machineTypes/n2-standard-2
	f.Zone, f.Type = path.Base(f.Zone), path.Base(f.Type)
	if i := strings.LastIndexByte(f.Zone, '-'); i > 0 {
		f.Region = f.Zone[:i]
	}
	const interfaces = "/computeMetadata/v1/instance/network-interfaces/?recursive=true&alt=json"
	body, err := g.get(ctx, interfaces, maxFact)
	if err != nil {
		return Facts{}, err
	}
	var list []networkInterface
	if err := decode(Google, interfaces, body, &list); err != nil {
		return Facts{}, err
	}
	if len(list) > maxNICs {
		return Facts{}, fmt.Errorf("asking Google Cloud for %s: it has more than %d interfaces", interfaces, maxNICs)
	}
	for _, i := range list {
		n, err := i.nic()
		if err != nil {
			return Facts{}, fmt.Errorf("asking Google Cloud for %s: %w", interfaces, err)
		}
		f.NICs = append(f.NICs, n)
	}
	return f, nil
}

func (i networkInterface) nic() (n NIC, err error) {
	if n.MAC, err = mac(i.MAC); err != nil {
		return n, err
	}
	if len(i.IPv6s)+len(i.IPAliases) > maxPublic {
		return n, fmt.Errorf("an interface has more than %d addresses", maxPublic)
	}
	if i.IP != "" {
		x := Address{}
		if x.Address, err = addr(i.IP); err != nil {
			return n, err
		}
		// An interface has at most one access configuration of IPv4.
		if len(i.AccessConfigs) > 0 && i.AccessConfigs[0].ExternalIP != "" {
			if x.Public, err = public(i.AccessConfigs[0].ExternalIP); err != nil {
				return n, err
			}
		}
		n.Addresses = append(n.Addresses, x)
		if m := net.ParseIP(i.SubnetMask).To4(); m != nil && x.Address.Is4() {
			if ones, bits := net.IPMask(m).Size(); bits == 32 {
				n.Subnets = append(n.Subnets, netip.PrefixFrom(x.Address, ones).Masked())
			}
		}
	}
	for _, t := range i.IPv6s {
		ip, err := addr(t)
		if err != nil {
			return n, err
		}
		n.Addresses = append(n.Addresses, Address{Address: ip})
	}
	for _, t := range i.IPAliases {
		p, err := netip.ParsePrefix(t)
		if err != nil {
			return n, fmt.Errorf("%q is not an alias range", short(t))
		}
		if p.IsSingleIP() { // a longer range is for hosts behind the machine
			n.Addresses = append(n.Addresses, Address{Address: p.Addr()})
		}
	}
	if i.Gateway != "" {
		if n.Router, err = addr(i.Gateway); err != nil {
			return n, err
		}
	}
	if i.MTU != "" {
		mtu, err := i.MTU.Int64()
		if err != nil || mtu < 68 || mtu > 65535 {
			return n, fmt.Errorf("%q is not an MTU", short(i.MTU.String()))
		}
		n.MTU = int(mtu)
	}
	return n, nil
}
