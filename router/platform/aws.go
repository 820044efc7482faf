package platform

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// aws reads the instance metadata service of EC2, only version 2: each request carries a token from
// a PUT, which a proxy, a redirected request or a forwarded packet cannot get (AWS EC2 User Guide,
// "Use the Instance Metadata Service", "How IMDSv2 works").
type aws struct{ *client }

const tokenSeconds = "60"

// token requests a token for the next requests.
func (a *aws) token(ctx context.Context) (map[string]string, error) {
	body, _, err := a.do(ctx, request{method: http.MethodPut, path: "/latest/api/token", header: map[string]string{"X-aws-ec2-metadata-token-ttl-seconds": tokenSeconds}, limit: maxLine})
	if errors.Is(err, errMissing) {
		return nil, errors.New("asking AWS for a token: the service does not offer IMDSv2, which every instance of EC2 has and isthmus requires: look for a proxy at 169.254.169.254")
	}
	if err != nil {
		return nil, err
	}
	token, err := oneLine(AWS, "/latest/api/token", body)
	if err == nil && (token == "" || strings.ContainsAny(token, " \t<>")) {
		err = errors.New("asking AWS for a token: the answer is not a token: look for a proxy at 169.254.169.254")
	}
	return map[string]string{"X-aws-ec2-metadata-token": token}, err
}

// UserData implements Reader.
func (a *aws) UserData(ctx context.Context) ([]byte, error) {
	token, err := a.token(ctx)
	if err != nil {
		return nil, err
	}
	body, _, err := a.do(ctx, request{path: "/latest/user-data", header: token, limit: MaxUserData})
	if errors.Is(err, errMissing) {
		return nil, nil
	}
	return body, err
}

// identity is the used part of the instance identity document (AWS EC2 User Guide, "Instance
// identity documents").
type identity struct {
	InstanceID       string `json:"instanceId"`
	InstanceType     string `json:"instanceType"`
	Region           string `json:"region"`
	AvailabilityZone string `json:"availabilityZone"`
}

// Facts implements Reader. Fields: AWS EC2 User Guide, "Instance metadata categories".
func (a *aws) Facts(ctx context.Context) (Facts, error) {
	token, err := a.token(ctx)
	if err != nil {
		return Facts{}, err
	}
	const document = "/latest/dynamic/instance-identity/document"
	body, _, err := a.do(ctx, request{path: document, header: token})
	if err != nil {
		return Facts{}, err
	}
	var id identity
	if err := decode(AWS, document, body, &id); err != nil {
		return Facts{}, err
	}
	if !strings.HasPrefix(id.InstanceID, "i-") {
		return Facts{}, fmt.Errorf("asking AWS for %s: %q is not the id of an instance", document, short(id.InstanceID))
	}
	f := Facts{Platform: AWS, Instance: id.InstanceID, Region: id.Region, Zone: id.AvailabilityZone, Type: id.InstanceType}
	const macs = "/latest/meta-data/network/interfaces/macs/"
	list, err := a.lines(ctx, request{path: macs, header: token}, maxNICs)
	if err != nil {
		return Facts{}, err
	}
	devices := map[string]string{}
	for _, entry := range list {
		nic, device, err := a.nic(ctx, macs, strings.TrimSuffix(entry, "/"), token)
		if err != nil {
			return Facts{}, err
		}
		f.NICs, devices[nic.MAC] = append(f.NICs, nic), device
	}
	// The list is in the order of MACs; device 0 is the primary one.
	slices.SortStableFunc(f.NICs, func(x, y NIC) int {
		if d := len(devices[x.MAC]) - len(devices[y.MAC]); d != 0 {
			return d
		}
		return strings.Compare(devices[x.MAC], devices[y.MAC])
	})
	return f, nil
}

func (a *aws) nic(ctx context.Context, macs, entry string, token map[string]string) (n NIC, device string, err error) {
	if n.MAC, err = mac(entry); err != nil {
		return n, "", fmt.Errorf("asking AWS for %s: %w", macs, err)
	}
	at := macs + n.MAC + "/"
	lines := func(what string) ([]string, error) {
		out, err := a.lines(ctx, request{path: at + what, header: token}, maxPublic)
		if errors.Is(err, errMissing) {
			return nil, nil
		}
		return out, err
	}
	wrong := func(what string, err error) error { return fmt.Errorf("asking AWS for %s: %w", at+what, err) }
	number, err := lines("device-number")
	if err != nil {
		return n, "", err
	}
	for _, what := range []string{"local-ipv4s", "ipv6s"} {
		texts, err := lines(what)
		if err != nil {
			return n, "", err
		}
		for _, t := range texts {
			ip, err := addr(t)
			if err != nil {
				return n, "", wrong(what, err)
			}
			n.Addresses = append(n.Addresses, Address{Address: ip})
		}
	}
	for _, what := range []string{"subnet-ipv4-cidr-block", "subnet-ipv6-cidr-blocks"} {
		texts, err := lines(what)
		if err != nil {
			return n, "", err
		}
		for _, t := range texts {
			p, err := netip.ParsePrefix(t)
			if err != nil {
				return n, "", wrong(what, fmt.Errorf("%q is not a prefix", short(t)))
			}
			n.Subnets = append(n.Subnets, p.Masked())
		}
	}
	n.Router = firstHost(n.Subnets)
	publics, err := lines("ipv4-associations/")
	if err != nil {
		return n, "", err
	}
	for _, t := range publics {
		ip, err := public(t)
		if err != nil {
			return n, "", wrong("ipv4-associations/", err)
		}
		private, err := lines("ipv4-associations/" + ip.String())
		if err != nil {
			return n, "", err
		}
		for _, p := range private {
			if i := slices.IndexFunc(n.Addresses, func(x Address) bool { return x.Address.String() == p }); i >= 0 {
				n.Addresses[i].Public = ip
			}
		}
	}
	return n, strings.Join(number, ""), nil
}

// firstHost returns the first host address of the first IPv4 subnet, which is the router's on AWS
// (VPC User Guide, "Subnet sizing") and on Azure ("Virtual network FAQ").
func firstHost(subnets []netip.Prefix) netip.Addr {
	for _, p := range subnets {
		if p.Addr().Is4() {
			return p.Addr().Next()
		}
	}
	return netip.Addr{}
}
