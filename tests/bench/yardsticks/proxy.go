package main

import (
	"bytes"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"time"
)

// runProxy is the yardstick: a reverse proxy to one server, as a program on Go's standard library has it in a few lines.
// It sends every write of its upstream on at once, and keeps its idle connections for less time than a child does.
func runProxy(arguments []string) error {
	flags := flag.NewFlagSet("proxy", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:0", "where it listens")
	upstream := flags.String("upstream", "", "HOST:PORT of the server behind it")
	_ = flags.Parse(arguments)

	target := &url.URL{Scheme: "http", Host: *upstream}
	proxy := &httputil.ReverseProxy{
		Rewrite:       func(request *httputil.ProxyRequest) { request.SetURL(target) },
		FlushInterval: -1,
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{}).DialContext,
			DisableCompression:  true,
			MaxIdleConnsPerHost: 2048,
			IdleConnTimeout:     4 * time.Second,
		},
	}
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	return http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Whoever looks for the model in a body has read it. Without that this proxy breaks an answer now and then which
		// comes while its transport still looks for the end of the body.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		proxy.ServeHTTP(w, r)
	}))
}
