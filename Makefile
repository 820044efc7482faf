# isthmus. `make help` lists the targets.
SHELL   := /bin/bash
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
TOOLS   := $(CURDIR)/.cache/bin
VM      := go run ./test/vm/cmd/vm
RUN     := test/run/run

export CGO_ENABLED := 0

PROTOC_GEN_GO      := google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
PROTOC_GEN_GO_GRPC := google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
STATICCHECK        := honnef.co/go/tools/cmd/staticcheck@v0.7.0
BUF                := github.com/bufbuild/buf/cmd/buf@v1.75.0

.PHONY: help build image test-image test-image-all test-former deb setup demo lab unit race test test-host test-nodes test-clouds test-guest soak fuzz bench lint generate check-generated golden clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## bin/isthmusd and bin/isthmus
	@mkdir -p bin
	go build -trimpath -ldflags '-s -w -X main.version=$(VERSION) -X main.buildVersion=$(VERSION)' -o bin/ ./cmd/isthmusd ./cmd/isthmus

deb: build ## Debian packages of isthmus and isthmusd, in bin/deb
	@test/setup deb
	image/debian/build

image: deb ## the image of the appliance for AWS, Azure, Google Cloud and KVM, in bin/image (root; KEY=FILE signs the slot for others, KERNEL=backports takes a newer kernel)
	@test/setup image
	go build -trimpath -ldflags '-s -w' -o bin/ ./cmd/isthmus-system
	$(BUILD_IMAGE) bin/deb/*.deb

BUILD_IMAGE = go run ./image/cmd/image build -version "$$(image/debian/version)" -epoch "$$(git log -1 --format=%ct)" $(if $(KEY),-key $(KEY)) $(if $(KERNEL),-kernel $(KERNEL))

test-image: image ## build the image twice, start it under QEMU by BIOS, UEFI and Secure Boot, and use it
	$(BUILD_IMAGE) -forms=false -out .cache/image bin/deb/*.deb
	cmp bin/image/slot.img .cache/image/slot.img && cmp bin/image/disk.raw .cache/image/disk.raw && rm -r .cache/image
	$(RUN) -count=1 -timeout 40m -run '^(TestImage|TestInFirmware)$$' ./test/appliance

test-image-all: image ## test-image's boots and those that take longer: slots that fail, the power cut, disks and clocks that are wrong
	go test -count=1 -timeout 120m -v ./test/appliance

test-former: setup build ## a node of revision FORMER (of git), taken over by this revision under traffic
	test/former $(FORMER)
	go test -tags former -count=1 -timeout 15m -v -run '^TestFormer$$' ./test/e2e

setup: ## install what tests, demo and lab need (Debian packages; starts no service)
	@test/setup

demo: setup build ## three clouds, a site and a partner around one node, in a VM: shows the main job
	go build -o bin/clouds ./test/e2e/clouds && bin/clouds demo

lab: setup build ## the same topology, with a prompt
	go build -o bin/clouds ./test/e2e/clouds && bin/clouds lab

unit: ## the pure tests and those with fakes, on any system with Go, as any user; skips what needs root
	test/unit

# The rooms whose goroutines share state. The detector needs cgo.
race: ## the tests of the daemon's rooms under the race detector (root; installs gcc)
	@test/setup race
	CGO_ENABLED=1 go test -race -timeout 40m ./router/... ./bgp/... ./nat/... ./tunnel/... ./cmd/isthmusd

test: setup build ## every test; what needs a fuller kernel than this one runs itself in a VM
	@test/setup deb
	@rm -rf .cache/test
	go vet ./...
	$(VM) build >/dev/null # the tests of bgp/gobgp take BIRD and FRR from there
	@# Two parts at a time: the tests of one wait while those of the other work. The longest come first.
	$(MAKE) --no-print-directory -j2 TWO=1 test-clouds test-host test-nodes test-guest test-image
	@$(RUN) -slowest

test-host: ## of make test: what this kernel can do, without whole nodes
	$(RUN) -timeout 60m $$(go list ./... | grep -vE '/test/(e2e|appliance|vm)|/tunnel/(ipsec|wireguard)$$')
	$(RUN) -timeout 60m -skip '$(INGUEST)' ./tunnel/ipsec ./tunnel/wireguard

# Never from go's cache: it does not know that the tests of nodes build the programs.
test-nodes: ## of make test: whole nodes on this kernel
	$(RUN) -again $$(go list ./test/e2e/... | grep -vE '$(CLOUDS)')

test-clouds: ## of make test: nodes with IPsec tunnels, in a VM unless this kernel has everything
	$(RUN) -again $$(go list ./test/e2e/... | grep -E '$(CLOUDS)')

CLOUDS := /test/e2e(/native|/rendered)?$$

test-guest: ## of make test: the rest of what needs a fuller kernel, in a VM as well
	$(RUN) -timeout 60m ./test/vm/...
	$(RUN) -guest -t 15m -p image/debian/strongswan.d/isthmus.conf ./tunnel/ipsec -test.run '$(INGUEST)'
	@# With Debian 12's kernel and charon, 5.9.8. The others pass there too.
	$(RUN) -guest -suite bookworm -t 15m -p image/debian/strongswan.d/isthmus.conf ./tunnel/ipsec -test.run '^(TestTunnel|TestReasons)$$'
	$(RUN) -guest -t 5m ./tunnel/wireguard

# Only one VM of these two runs at a time.
ifdef TWO
test-guest: | test-clouds
endif

# Of tunnel/ipsec and tunnel/wireguard: the tests that need what only the guest's kernel has.
INGUEST := ^(TestTunnel.*|TestReasons|TestExplained|TestKernel)$$

RUNS ?= 10

soak: setup ## every test RUNS times next to stress-ng, or IDLE=1: alone; a table of the runs, with the tests that failed
	test/soak $(if $(IDLE),-idle) $(RUNS)

FUZZTIME ?= 100000x

fuzz: ## each importer, the readers of topologies, documents and edits, of DNS and netlink messages, and the filter of BGP, on made-up input; FUZZTIME=10m for longer
	for t in FuzzAWS FuzzAzure FuzzGCP; do \
	  go test ./tunnel/cloud/importer -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x || exit 1; done
	go test ./router/topology -run '^$$' -fuzz '^FuzzRead$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	for t in FuzzDecode FuzzEdit; do \
	  go test ./router/spec -run '^$$' -fuzz "^$$t\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x || exit 1; done
	go test ./router/egress/dns -run '^$$' -fuzz '^FuzzRead$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./router/netlink -run '^$$' -fuzz '^FuzzRead$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./router/lane/stamp -run '^$$' -fuzz '^FuzzParse$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./bgp/filter -run '^$$' -fuzz '^FuzzMessages$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x
	go test ./bgp/gobgp -run '^$$' -fuzz '^FuzzFilter$$' -fuzztime $(FUZZTIME) -fuzzminimizetime 10x

bench: setup ## figures side by side with other implementations (five minutes), or with revision FORMER (of git)
	$(if $(FORMER),test/former $(FORMER))
	go run ./test/bench $(if $(FORMER),-former .cache/former)

lint: ## gofmt, go vet, staticcheck, buf
	@test -z "$$(gofmt -l . | tee /dev/stderr)"
	go vet ./...
	go vet -tags former ./test/e2e
	go run $(STATICCHECK) ./...
	go run $(BUF) lint proto
	@# Compiles what make unit runs on a Mac and on Windows.
	for os in darwin windows; do GOOS=$$os go vet $$(GOOS=$$os test/unit list) || exit 1; done

generate: ## Go from .proto, docs/spec.md, docs/topology.md and docs/cli.md
	@test/setup generate
	@mkdir -p $(TOOLS)
	GOBIN=$(TOOLS) go install $(PROTOC_GEN_GO)
	GOBIN=$(TOOLS) go install $(PROTOC_GEN_GO_GRPC)
	PATH=$(TOOLS):$$PATH protoc -I proto --go_out=. --go_opt=module=github.com/isthmus-net/isthmus \
	  --go-grpc_out=. --go-grpc_opt=module=github.com/isthmus-net/isthmus proto/isthmus/v1/*.proto
	go test ./cmd/isthmus -run TestDocs -update

check-generated: generate ## fail when a generated file is not current
	git diff --exit-code -- proto docs

# The tests are those that call golden.Check.
golden: ## renew the golden files and the generated pages; look at the difference
	@files=$$(git grep -l 'golden\.Check(' -- '*_test.go' ':!test/golden'); \
	tests=$$(awk '/^func Test/ { split($$2, a, "("); t = a[1] } /golden\.Check\(/ { print t }' $$files | sort -u | paste -sd'|'); \
	set -x; go test -count=1 -run "^($$tests)$$" $$(dirname $$files | sort -u | sed 's|^|./|') -update

clean: ## remove what was built here (not the cached guest)
	rm -rf bin .cache
