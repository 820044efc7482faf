package platform

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
)

// azure reads Azure's Instance Metadata Service (Azure documentation, "Azure Instance Metadata
// Service"), and reports to the wire server that the machine is provisioned.
type azure struct {
	*client
	wire *client
}

// imds is the version of the service's API. Field userData needs 2021-01-01.
const imds = "api-version=2021-12-13"

var azureHeader = map[string]string{"Metadata": "true"}

// UserData implements Reader. It is userData, else customData, in base64. The service has
// customData only where Azure provides it.
func (a *azure) UserData(ctx context.Context) ([]byte, error) {
	for _, field := range []string{"userData", "customData"} {
		path := "/metadata/instance/compute/" + field + "?" + imds + "&format=text"
		// Four characters of base64 are three bytes.
		body, _, err := a.do(ctx, request{path: path, header: azureHeader, limit: MaxUserData/3*4 + 8})
		if errors.Is(err, errMissing) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if body = bytes.TrimSpace(body); len(body) == 0 {
			continue
		}
		data, err := base64.StdEncoding.DecodeString(string(body))
		if err != nil {
			return nil, fmt.Errorf("asking Azure for %s: the answer is not base64: give the user-data in base64, as `az vm create --user-data FILE` does", field)
		}
		if len(data) > MaxUserData {
			return nil, fmt.Errorf("asking Azure for %s: it is larger than %d bytes: make it smaller", field, MaxUserData)
		}
		return data, nil
	}
	return nil, nil
}

// azureNetwork is the used part of the network metadata.
type azureNetwork struct {
	Interface []struct {
		MACAddress string
		IPv4, IPv6 struct {
			IPAddress []struct{ PrivateIPAddress, PublicIPAddress string }
			Subnet    []struct{ Address, Prefix string }
		}
	}
}

// balancer is the load balancer's metadata, which has the public addresses of SKU Standard, also
// those of a NIC without a load balancer: the instance's metadata has an empty text for them (Azure
// documentation, "Retrieve load balancer metadata").
type balancer struct {
	LoadBalancer struct {
		PublicIPAddresses []struct{ FrontendIPAddress, PrivateIPAddress string }
	}
}

// Facts implements Reader.
func (a *azure) Facts(ctx context.Context) (Facts, error) {
	// Read the fields of compute one by one, because the whole group includes the user-data.
	f := Facts{Platform: Azure}
	for _, fact := range []struct {
		field string
		into  *string
	}{{"vmId", &f.Instance}, {"location", &f.Region}, {"zone", &f.Zone}, {"vmSize", &f.Type}} {
		field := fact.field
		value, err := a.text(ctx, request{path: "/metadata/instance/compute/" + field + "?" + imds + "&format=text", header: azureHeader})
		if errors.Is(err, errMissing) && field == "zone" {
			continue
		}
		if err != nil {
			return Facts{}, err
		}
		*fact.into = value
	}
	if len(f.Instance) != 36 || strings.Count(f.Instance, "-") != 4 {
		return Facts{}, fmt.Errorf("asking Azure for vmId: %q is not the id of a machine", short(f.Instance))
	}
	var in azureNetwork
	const network = "/metadata/instance/network?" + imds
	body, _, err := a.do(ctx, request{path: network, header: azureHeader})
	if err != nil {
		return Facts{}, err
	}
	if err := decode(Azure, network, body, &in); err != nil {
		return Facts{}, err
	}
	standard := map[netip.Addr]netip.Addr{}
	const balanced = "/metadata/loadbalancer?api-version=2020-10-01"
	body, _, err = a.do(ctx, request{path: balanced, header: azureHeader})
	switch {
	case errors.Is(err, errMissing): // no address of that SKU
	case err != nil:
		return Facts{}, err
	default:
		var b balancer
		if err := decode(Azure, balanced, body, &b); err != nil {
			return Facts{}, err
		}
		if len(b.LoadBalancer.PublicIPAddresses) > maxPublic {
			return Facts{}, fmt.Errorf("asking Azure for %s: it has more than %d addresses", balanced, maxPublic)
		}
		for _, p := range b.LoadBalancer.PublicIPAddresses {
			front, err := public(p.FrontendIPAddress)
			if err != nil {
				return Facts{}, fmt.Errorf("asking Azure for %s: %w", balanced, err)
			}
			back, err := addr(p.PrivateIPAddress)
			if err != nil {
				return Facts{}, fmt.Errorf("asking Azure for %s: %w", balanced, err)
			}
			standard[back] = front
		}
	}
	if len(in.Interface) > maxNICs {
		return Facts{}, fmt.Errorf("asking Azure for %s: it has more than %d interfaces", network, maxNICs)
	}
	for _, i := range in.Interface {
		n := NIC{}
		if n.MAC, err = mac(i.MACAddress); err != nil {
			return Facts{}, fmt.Errorf("asking Azure for %s: %w", network, err)
		}
		for _, family := range []struct {
			IPAddress []struct{ PrivateIPAddress, PublicIPAddress string }
			Subnet    []struct{ Address, Prefix string }
		}{i.IPv4, i.IPv6} {
			if len(family.IPAddress) > maxPublic || len(family.Subnet) > maxPublic {
				return Facts{}, fmt.Errorf("asking Azure for %s: an interface has more than %d addresses", network, maxPublic)
			}
			for _, p := range family.IPAddress {
				if p.PrivateIPAddress == "" {
					continue
				}
				x := Address{}
				if x.Address, err = addr(p.PrivateIPAddress); err != nil {
					return Facts{}, fmt.Errorf("asking Azure for %s: %w", network, err)
				}
				if x.Public = standard[x.Address]; p.PublicIPAddress != "" {
					if x.Public, err = public(p.PublicIPAddress); err != nil {
						return Facts{}, fmt.Errorf("asking Azure for %s: %w", network, err)
					}
				}
				n.Addresses = append(n.Addresses, x)
			}
			for _, s := range family.Subnet {
				p, err := netip.ParsePrefix(s.Address + "/" + s.Prefix)
				if err != nil {
					return Facts{}, fmt.Errorf("asking Azure for %s: %q is not a subnet", network, short(s.Address+"/"+s.Prefix))
				}
				n.Subnets = append(n.Subnets, p.Masked())
			}
		}
		n.Router = firstHost(n.Subnets)
		f.NICs = append(f.NICs, n)
	}
	return f, nil
}

// Provisioner is a reader of a platform that waits for a report before it calls a machine
// provisioned.
type Provisioner interface {
	// ReportReady reports once that the machine is ready.
	ReportReady(ctx context.Context) error
}

// goalState is the used part of the wire server's answer.
type goalState struct {
	Incarnation string
	ContainerID string   `xml:"Container>ContainerId"`
	InstanceIDs []string `xml:"Container>RoleInstanceList>RoleInstance>InstanceId"`
}

// health is the report, in the form of Azure's agents (Azure documentation, "Creating generalized
// images without a provisioning agent").
type health struct {
	XMLName     xml.Name `xml:"Health"`
	Incarnation string   `xml:"GoalStateIncarnation"`
	ContainerID string   `xml:"Container>ContainerId"`
	InstanceID  string   `xml:"Container>RoleInstanceList>Role>InstanceId"`
	State       string   `xml:"Container>RoleInstanceList>Role>Health>State"`
}

var _ Provisioner = (*azure)(nil)

// ReportReady implements Provisioner.
func (a *azure) ReportReady(ctx context.Context) error {
	header := map[string]string{"x-ms-version": "2012-11-30", "x-ms-agent-name": "isthmus"}
	body, _, err := a.wire.do(ctx, request{path: "/machine/?comp=goalstate", header: header})
	if err != nil {
		return err
	}
	var goal goalState
	if err := xml.Unmarshal(body, &goal); err != nil {
		return fmt.Errorf("asking Azure's wire server for the goal state: the answer is not the XML that the platform documents: %w", err)
	}
	if goal.Incarnation == "" || goal.ContainerID == "" || len(goal.InstanceIDs) != 1 {
		return errors.New("asking Azure's wire server for the goal state: the answer does not name one container and one instance")
	}
	report, err := xml.Marshal(health{Incarnation: goal.Incarnation, ContainerID: goal.ContainerID, InstanceID: goal.InstanceIDs[0], State: "Ready"})
	if err != nil {
		return fmt.Errorf("encoding health report: %w", err)
	}
	_, _, err = a.wire.do(ctx, request{method: http.MethodPost, path: "/machine?comp=health", body: xml.Header + string(report), header: map[string]string{
		"x-ms-version": header["x-ms-version"], "x-ms-agent-name": "isthmus", "Content-Type": "text/xml;charset=utf-8",
	}})
	return err
}
