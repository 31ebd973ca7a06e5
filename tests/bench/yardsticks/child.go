package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	// What cpp-httplib, llama-server's HTTP library, allows a connection.
	idleTimeout          = 5 * time.Second
	answersPerConnection = 100

	stateLine = "cmd_child_to_router:state:"
	exitLine  = "cmd_router_to_child:exit"

	// neverLoads is the model that loads for ever.
	neverLoads = "never"

	// What llama-server answers a short chat, about as long as it is there.
	whole = `{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":" I am alpha"}}],` +
		`"created":1795288864,"model":"alpha","system_fingerprint":"b0-unknown","object":"chat.completion","usage":` +
		`{"completion_tokens":4,"prompt_tokens":56,"total_tokens":60,"prompt_tokens_details":{"cached_tokens":0}},` +
		`"id":"chatcmpl-NIyfavSkiJK5Xqox4GG5Bkr3CErMOR8N","timings":{"cache_n":0,"prompt_n":56,"prompt_ms":0.477,` +
		`"prompt_per_token_ms":0.008517857142857143,"prompt_per_second":117400.41928721174,"predicted_n":4,` +
		`"predicted_ms":0.167,"predicted_per_token_ms":0.05566666666666667,"predicted_per_second":17964.071856287424}}`
	// One event of a stream, with the time of its sending in it: 233 bytes, as llama-server's.
	event = `data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" alpha"}}],"created":1795288864,` +
		`"id":"chatcmpl-mGvR9SxHEvGtJAAtpacf0R8oIr08wK","model":"alpha","object":"chat.completion.chunk",` +
		sentKey + `%d}` + "\n\n"
	sentKey = `"sent_ns":`
)

// An order says in a request's body how the child answers; llama-server would overlook these keys.
type order struct {
	Stream  bool    `json:"stream"`
	ThinkMs float64 `json:"think_ms"` // until the answer or its first event
	Events  int     `json:"events"`   // of a stream
	PerS    float64 `json:"per_s"`    // events in a second
}

// child is the process of one model as the router and clients see it, without the model.
type child struct {
	alias   string
	isReady atomic.Bool
	busy    atomic.Int64
	answers atomic.Int64
}

type connectionKey struct{}

// runChild is started with the arguments of a llama-server that serves one model, and obeys its router.
func runChild(arguments []string) error {
	options := map[string]string{"--host": "127.0.0.1", "--port": "8080", "--alias": "alpha"}
	for at, word := range arguments[:max(len(arguments)-1, 0)] {
		if _, isKnown := options[word]; isKnown {
			options[word] = arguments[at+1]
		}
	}
	self := &child{alias: options["--alias"]}
	listener, err := net.Listen("tcp", net.JoinHostPort(options["--host"], options["--port"]))
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:     self,
		IdleTimeout: idleTimeout,
		ConnContext: func(ctx context.Context, _ net.Conn) context.Context {
			return context.WithValue(ctx, connectionKey{}, new(atomic.Int64))
		},
	}
	go self.obey()
	return server.Serve(listener)
}

// obey tells the router that the model is loaded, and ends when it says so or dies.
func (self *child) obey() {
	self.tellState("loading", map[string]any{"stages": []string{"text_model"}, "current": "text_model", "value": 0.5})
	if self.alias != neverLoads {
		self.isReady.Store(true)
		self.tellState("ready", map[string]any{
			"id": self.alias, "aliases": []string{self.alias}, "tags": []string{}, "object": "model",
			"created": time.Now().Unix(), "owned_by": "llamacpp",
			"architecture": map[string][]string{"input_modalities": {"text"}, "output_modalities": {"text"}},
			"meta":         map[string]any{"vocab_type": 1, "n_vocab": 100, "n_ctx": 512, "n_ctx_train": 512},
		})
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() && !strings.Contains(lines.Text(), exitLine) {
	}
	os.Exit(0)
}

func (self *child) tellState(state string, payload any) {
	text, _ := json.Marshal(map[string]any{"state": state, "payload": payload})
	fmt.Printf("%s%s\n", stateLine, text)
}

// ServeHTTP answers a chat as the request orders, and what a router and llamavisor ask.
func (self *child) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	head := w.Header()
	head["Date"] = nil
	head.Set("Server", "llama.cpp")
	head.Set("Content-Type", "application/json; charset=utf-8")
	head.Set("Keep-Alive", "timeout=5, max=100")
	if r.Context().Value(connectionKey{}).(*atomic.Int64).Add(1) >= answersPerConnection {
		head.Set("Connection", "close")
	}
	switch {
	case !self.isReady.Load():
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `{"error":{"message":"Loading model","type":"unavailable_error","code":503}}`)
	case r.Method == http.MethodPost:
		self.busy.Add(1)
		self.chat(w, r)
		self.busy.Add(-1)
		self.answers.Add(1)
	case r.URL.Path == "/metrics":
		head.Set("Content-Type", "text/plain; version=0.0.4")
		fmt.Fprintf(w, "llamacpp:requests_processing %d\nllamacpp:requests_deferred 0\nllamacpp:n_decode_total %d\n",
			self.busy.Load(), self.answers.Load())
	case r.URL.Path == "/health":
		io.WriteString(w, `{"status":"ok"}`)
	case r.URL.Path == "/props":
		fmt.Fprintf(w, `{"total_slots":4,"model_alias":%q,"endpoint_metrics":true}`, self.alias)
	default:
		w.WriteHeader(http.StatusNotFound)
		io.WriteString(w, `{"error":{"message":"File Not Found","type":"not_found_error","code":404}}`)
	}
}

func (self *child) chat(w http.ResponseWriter, r *http.Request) {
	var wanted order
	if err := json.NewDecoder(r.Body).Decode(&wanted); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	think := time.Duration(wanted.ThinkMs * float64(time.Millisecond))
	if !wanted.Stream {
		time.Sleep(think)
		w.Header().Set("Content-Length", strconv.Itoa(len(whole)))
		io.WriteString(w, whole)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no")
	w.Header().Set("Connection", "close") // a true child does so after a stream, but does not announce it
	flusher := w.(http.Flusher)
	began := time.Now().Add(think)
	flusher.Flush() // a true child sends its head at once, and its first event after the prefill
	for at := range wanted.Events {
		pause := time.Until(began.Add(time.Duration(float64(at) / wanted.PerS * float64(time.Second))))
		select {
		case <-r.Context().Done():
			return
		case <-time.After(pause):
		}
		fmt.Fprintf(w, event, time.Now().UnixNano())
		flusher.Flush()
	}
	io.WriteString(w, "data: [DONE]\n\n")
}
