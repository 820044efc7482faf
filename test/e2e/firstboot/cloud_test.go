package firstboot

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/isthmus-net/isthmus/test/lab"
)

// cloud is the metadata service of a cloud, at its own address in the node's network, and Azure's
// wire server. It answers as the clouds document it: nothing without the header or the token that
// they require.
type cloud struct {
	kind     string
	userData string
	public   string // of 10.9.0.4

	mu      sync.Mutex
	hurdle  http.HandlerFunc // answers instead of all handlers; nil: none
	asked   []string         // requests, each with its client
	reports int
}

const token = "AQAEAOfakeTOKEN=="

func (c *cloud) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

// count returns how many requests contain a part.
func (c *cloud) count(part string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, q := range c.asked {
		if strings.Contains(q, part) {
			n++
		}
	}
	return n
}

func (c *cloud) serve(t *testing.T, n *lab.Node) {
	t.Helper()
	for _, at := range []string{"169.254.169.254:80", "168.63.129.16:80"} {
		l, err := n.Listen("tcp4", at)
		if err != nil {
			t.Fatal(err)
		}
		s := &http.Server{Handler: c, ReadHeaderTimeout: 10 * time.Second}
		go s.Serve(l)
		t.Cleanup(func() { s.Close() })
	}
}

func (c *cloud) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	from, _, _ := net.SplitHostPort(q.RemoteAddr)
	c.mu.Lock()
	c.asked = append(c.asked, from+" "+q.Method+" "+q.URL.String())
	hurdle, data, public := c.hurdle, c.userData, c.public
	c.mu.Unlock()
	if hurdle != nil {
		hurdle(w, q)
		return
	}
	answers := map[string]string{}
	switch c.kind {
	case "aws":
		if q.URL.Path == "/latest/api/token" && q.Method == http.MethodPut {
			io.WriteString(w, token)
			return
		}
		if q.Header.Get("X-aws-ec2-metadata-token") != token {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		const mac = "/latest/meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/"
		answers = map[string]string{
			"/latest/user-data":                          data,
			"/latest/dynamic/instance-identity/document": `{"instanceId": "i-1234567890abcdef0", "instanceType": "c6in.large", "region": "us-west-2", "availabilityZone": "us-west-2b"}`,
			"/latest/meta-data/network/interfaces/macs/": "0e:49:61:0f:c3:11/", mac + "device-number": "0", mac + "local-ipv4s": "10.9.0.4\n10.9.0.5",
			mac + "subnet-ipv4-cidr-block": "10.9.0.0/24", mac + "ipv4-associations/": public, mac + "ipv4-associations/" + public: "10.9.0.4",
		}
	case "azure":
		if q.URL.Path == "/machine/" {
			io.WriteString(w, `<GoalState><Incarnation>1</Incarnation><Container><ContainerId>c</ContainerId><RoleInstanceList><RoleInstance><InstanceId>i</InstanceId></RoleInstance></RoleInstanceList></Container></GoalState>`)
			return
		}
		if q.URL.Path == "/machine" {
			body, _ := io.ReadAll(io.LimitReader(q.Body, 1<<16))
			if strings.Contains(string(body), "<State>Ready</State>") {
				c.set(func() { c.reports++ })
			}
			return
		}
		if q.Header.Get("Metadata") != "true" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		const at = "/metadata/instance/compute/"
		answers = map[string]string{
			at + "userData": base64.StdEncoding.EncodeToString([]byte(data)), at + "vmId": "02aab8a4-74ef-476e-8182-f6d2ba4166a6", at + "location": "westeurope", at + "zone": "2", at + "vmSize": "Standard_D4s_v5",
			"/metadata/instance/network": `{"interface": [{"ipv4": {"ipAddress": [{"privateIpAddress": "10.9.0.4", "publicIpAddress": ""}], "subnet": [{"address": "10.9.0.0", "prefix": "24"}]}, "ipv6": {"ipAddress": []}, "macAddress": "0E49610FC311"}]}`,
			"/metadata/loadbalancer":     `{"loadbalancer": {"publicIpAddresses": [{"frontendIpAddress": "` + public + `", "privateIpAddress": "10.9.0.4"}]}}`,
		}
		if public == "" {
			delete(answers, "/metadata/loadbalancer")
		}
	case "google":
		if q.Header.Get("Metadata-Flavor") != "Google" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		const at = "/computeMetadata/v1/instance/"
		answers = map[string]string{
			at + "attributes/user-data": data, at + "id": "5555555555555555555", at + "zone": "projects/1/zones/us-central1-a", at + "machine-type": "projects/1/machineTypes/n2-standard-2",
			at + "network-interfaces/": `[{"accessConfigs": [{"externalIp": "` + public + `", "type": "ONE_TO_ONE_NAT"}], "gateway": "10.9.0.1", "ip": "10.9.0.4", "mac": "0e:49:61:0f:c3:11", "mtu": 1460, "subnetmask": "255.255.255.0"}]`,
		}
	}
	body, ok := answers[q.URL.Path]
	if !ok || body == "" {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	io.WriteString(w, body)
}

// hurdles are failures of the metadata service.
var hurdles = map[string]struct {
	answer http.HandlerFunc
	says   string
}{
	"slow": {func(w http.ResponseWriter, q *http.Request) {
		for q.Context().Err() == nil {
			fmt.Fprint(w, "x")
			w.(http.Flusher).Flush()
			time.Sleep(time.Second)
		}
	}, "no complete answer within"},
	"redirecting": {func(w http.ResponseWriter, q *http.Request) {
		http.Redirect(w, q, "http://198.51.100.130/trap", http.StatusTemporaryRedirect)
	}, "redirects"},
	"a web page": {func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html>sign in</html>")
	}, "web page"},
	"oversized": {func(w http.ResponseWriter, q *http.Request) { w.Write(slices.Repeat([]byte("x"), 1<<20)) }, "larger than"},
	"version 1 alone": {func(w http.ResponseWriter, q *http.Request) {
		if q.Method != http.MethodGet {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		fmt.Fprint(w, "#isthmus\nconsole: shell\n")
	}, "status 405"},
}
