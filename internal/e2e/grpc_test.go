//go:build linux

package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/orca"
)

// interopEnv holds "address host" for the process that runs the interop cases.
const interopEnv = "WEBGW_TEST_INTEROP"

// TestGRPCInterop runs gRPC's interoperability cases. A case that fails ends
// its process, so that they run in one of their own.
func TestGRPCInterop(t *testing.T) {
	g := startGateway(t)
	g.startNode()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	recorder := orca.NewServerMetricsRecorder()
	workload := grpc.NewServer(orca.CallMetricsServerOption(recorder))
	testgrpc.RegisterTestServiceServer(workload, interop.NewTestServer(interop.NewTestServerOptions{MetricsRecorder: recorder}))
	if err := orca.Register(workload, orca.ServiceOptions{MinReportingInterval: time.Second, ServerMetricsProvider: recorder}); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- workload.Serve(l) }()
	t.Cleanup(func() {
		workload.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	for _, upstream := range []string{"", "\nupstream: h2c"} {
		t.Run("upstream"+upstream, func(t *testing.T) {
			host := fmt.Sprintf("interop%d.%s", len(upstream), zone)
			g.expose(fmt.Sprintf("interop%d", len(upstream)), "protocol: http\nhosts: ["+host+"]"+upstream, l.Addr().String())
			address := fmt.Sprintf("127.0.0.1:%d", g.tlsPort)
			g.wait(host, func() error {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
				defer cancel()
				conn, err := dialInterop(address, host)
				if err != nil {
					return err
				}
				defer conn.Close()
				_, err = testgrpc.NewTestServiceClient(conn).EmptyCall(ctx, &testgrpc.Empty{})
				return err
			})
			c := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestGRPCInteropProcess$", "-test.v", "-test.timeout=60s")
			c.Env = append(os.Environ(), interopEnv+"="+address+" "+host, binaryEnv+"="+binary, "GRPC_GO_LOG_SEVERITY_LEVEL=error")
			out, err := c.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "all done") {
				t.Errorf("the case that is named last failed: %v\n%s", err, tail(string(out), 2000))
			}
		})
	}
}

func dialInterop(address, host string, more ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, append(more, grpc.WithAuthority(host), grpc.WithTransportCredentials(credentials.NewTLS(insecure(host))))...)
}

// TestGRPCInteropProcess is no test: it is the client of the one above, in its
// own process.
func TestGRPCInteropProcess(t *testing.T) {
	var address, host string
	if _, err := fmt.Sscan(os.Getenv(interopEnv), &address, &host); err != nil {
		return
	}
	conn, err := dialInterop(address, host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	oob, err := dialInterop(address, host, grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"test_backend_metrics_load_balancer":{}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	defer oob.Close()
	client, measured := testgrpc.NewTestServiceClient(conn), testgrpc.NewTestServiceClient(oob)
	call := func(f func(context.Context, testgrpc.TestServiceClient, ...grpc.CallOption)) func(context.Context) {
		return func(ctx context.Context) { f(ctx, client) }
	}
	for _, c := range []struct {
		name string
		run  func(context.Context)
	}{
		{"empty_unary", call(interop.DoEmptyUnaryCall)},
		{"large_unary", call(interop.DoLargeUnaryCall)},
		{"client_streaming", call(interop.DoClientStreaming)},
		{"server_streaming", call(interop.DoServerStreaming)},
		{"ping_pong", call(interop.DoPingPong)},
		{"empty_stream", call(interop.DoEmptyStream)},
		{"timeout_on_sleeping_server", call(interop.DoTimeoutOnSleepingServer)},
		{"cancel_after_begin", call(interop.DoCancelAfterBegin)},
		{"cancel_after_first_response", call(interop.DoCancelAfterFirstResponse)},
		{"custom_metadata", call(interop.DoCustomMetadata)},
		{"status_code_and_message", call(interop.DoStatusCodeAndMessage)},
		{"special_status_message", call(interop.DoSpecialStatusMessage)},
		{"unimplemented_method", func(context.Context) { interop.DoUnimplementedMethod(t.Context(), conn) }},
		{"unimplemented_service", func(ctx context.Context) {
			interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(conn))
		}},
		{"orca_per_rpc", func(ctx context.Context) { interop.DoORCAPerRPCTest(ctx, measured) }},
		{"orca_oob", func(ctx context.Context) { interop.DoORCAOOBTest(ctx, measured) }},
	} {
		t.Log(c.name)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		c.run(ctx)
		cancel()
	}
	t.Log("all done")
}
