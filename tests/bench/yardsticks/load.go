package main

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// A true child closes its connection at the end of a stream without having said so in the head: a proxy that had the next
// request to send in that very moment would lose it.
const betweenStreams = 5 * time.Millisecond

// A load is what the clients do together; each has one connection and no goroutine but its own, so that little of what is
// measured is the measuring.
type load struct {
	address  string
	clients  int
	duration time.Duration
	order    string
}

func parseLoad(arguments []string) load {
	var wanted load
	flags := flag.NewFlagSet("load", flag.ExitOnError)
	flags.StringVar(&wanted.address, "to", "", "HOST:PORT")
	flags.IntVar(&wanted.clients, "clients", 1, "how many ask at the same time")
	flags.DurationVar(&wanted.duration, "for", time.Second, "for how long")
	flags.StringVar(&wanted.order, "order", "{}", "the body of each request")
	_ = flags.Parse(arguments)
	return wanted
}

// A client asks one thing after the other over a connection that it keeps while the server does.
type client struct {
	address string
	request []byte
	line    net.Conn
	reader  *bufio.Reader
}

func newClient(wanted load) *client {
	request := fmt.Sprintf("POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"+
		"Accept: */*\r\nUser-Agent: bench\r\nContent-Length: %d\r\n\r\n%s", wanted.address, len(wanted.order), wanted.order)
	return &client{address: wanted.address, request: []byte(request)}
}

// ask sends the request; a connection that the server has closed meanwhile is replaced once.
func (self *client) ask() (*http.Response, error) {
	wasOpen := self.line != nil
	answer, err := self.try()
	if err != nil && wasOpen {
		self.close()
		answer, err = self.try()
	}
	if err == nil && answer.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(answer.Body)
		err = fmt.Errorf("%s: %s", answer.Status, text)
	}
	return answer, err
}

func (self *client) try() (*http.Response, error) {
	if self.line == nil {
		line, err := net.Dial("tcp", self.address)
		if err != nil {
			return nil, err
		}
		self.line, self.reader = line, bufio.NewReader(line)
	}
	if _, err := self.line.Write(self.request); err != nil {
		return nil, err
	}
	return http.ReadResponse(self.reader, nil)
}

// done is called when an answer was read to its end.
func (self *client) done(answer *http.Response) {
	if answer.Close {
		self.close()
	}
}

func (self *client) close() {
	if self.line != nil {
		self.line.Close()
		self.line = nil
	}
}

// together runs every client until its work ends, and joins what went wrong.
func together(wanted load, work func(at int, self *client) error) error {
	var group sync.WaitGroup
	errs := make([]error, wanted.clients)
	for at := range wanted.clients {
		group.Go(func() {
			self := newClient(wanted)
			defer self.close()
			errs[at] = work(at, self)
		})
	}
	group.Wait()
	return errors.Join(errs...)
}

// loadRequests measures whole answers: each client asks again as soon as it has its answer.
func loadRequests(arguments []string) error {
	wanted := parseLoad(arguments)
	took := make([][]float64, wanted.clients)
	end := time.Now().Add(wanted.duration)
	err := together(wanted, func(at int, self *client) error {
		for time.Now().Before(end) {
			began := time.Now()
			answer, err := self.ask()
			if err != nil {
				return err
			}
			if _, err := io.Copy(io.Discard, answer.Body); err != nil {
				return err
			}
			took[at] = append(took[at], time.Since(began).Seconds())
			self.done(answer)
		}
		return nil
	})
	if err != nil {
		return err
	}
	all := slices.Concat(took...)
	return tell(map[string]any{"count": len(all), "latency_s": spread(all)})
}

// loadStreams measures streams: the time to the first event and, where events tell when they were sent, by how much the
// time between two of them differs from what it was then. The clients do not begin at the same time.
func loadStreams(arguments []string) error {
	wanted := parseLoad(arguments)
	counts := make([]int, wanted.clients)
	first, jitters := make([][]float64, wanted.clients), make([][]float64, wanted.clients)
	start := time.Now()
	err := together(wanted, func(at int, self *client) error {
		time.Sleep(wanted.duration * time.Duration(at) / time.Duration(8*wanted.clients))
		for time.Since(start) < wanted.duration {
			began := time.Now()
			answer, err := self.ask()
			if err != nil {
				return err
			}
			last, isFirst := int64(0), true
			err = readEvents(answer.Body, func(sent, received int64) {
				onWay := received - sent
				if isFirst {
					first[at] = append(first[at], time.Since(began).Seconds())
				} else if sent != 0 {
					jitters[at] = append(jitters[at], math.Abs(float64(onWay-last))/1e9)
				}
				last, isFirst = onWay, false
				counts[at]++
			})
			if err != nil {
				return err
			}
			self.done(answer)
			time.Sleep(betweenStreams)
		}
		return nil
	})
	if err != nil {
		return err
	}
	count := 0
	for _, each := range counts {
		count += each
	}
	return tell(map[string]any{
		"count":    count,
		"first_s":  spread(slices.Concat(first...)),
		"jitter_s": spread(slices.Concat(jitters...)),
	})
}

// readEvents calls for each event with the times at which it was sent (0 if it does not tell) and received, and fails
// unless the stream has its proper end.
func readEvents(body io.Reader, each func(sent, received int64)) error {
	lines := bufio.NewReader(body)
	isWhole := false
	for {
		line, err := lines.ReadSlice('\n')
		received := time.Now().UnixNano()
		if err == io.EOF && isWhole {
			return nil
		}
		if err != nil {
			return fmt.Errorf("a stream broke: %w", err)
		}
		isWhole = isWhole || bytes.HasPrefix(line, []byte("data: [DONE]"))
		if !bytes.HasPrefix(line, []byte("data: {")) {
			continue
		}
		sent := int64(0)
		if _, rest, tells := bytes.Cut(line, []byte(sentKey)); tells {
			digits, _, _ := bytes.Cut(rest, []byte("}"))
			if sent, err = strconv.ParseInt(string(digits), 10, 64); err != nil {
				return err
			}
		}
		each(sent, received)
	}
}

// holdRequests sends one request per client, says so when all are sent (and, of streams, when all have their first event),
// and holds them until its input ends.
func holdRequests(arguments []string) error {
	wanted := parseLoad(arguments)
	isStream := bytes.Contains([]byte(wanted.order), []byte(`"stream"`))
	var open sync.WaitGroup
	open.Add(wanted.clients)
	failed := make(chan error, wanted.clients)
	for range wanted.clients {
		self := newClient(wanted)
		go func() {
			var once sync.Once
			line, err := net.Dial("tcp", self.address)
			if err == nil {
				self.line, self.reader = line, bufio.NewReader(line)
				_, err = line.Write(self.request)
			}
			if err == nil && !isStream {
				once.Do(open.Done)
			}
			var answer *http.Response
			if err == nil {
				answer, err = http.ReadResponse(self.reader, nil)
			}
			if err == nil && (!isStream || answer.StatusCode != http.StatusOK) {
				text, _ := io.ReadAll(answer.Body)
				err = fmt.Errorf("answered: %s: %s", answer.Status, text)
			}
			if err == nil {
				err = readEvents(answer.Body, func(_, _ int64) { once.Do(open.Done) })
			}
			failed <- errors.Join(errors.New("a request that was to be held is over"), err)
		}()
		time.Sleep(time.Millisecond) // an accept queue has its length
	}
	all := make(chan struct{})
	go func() { open.Wait(); close(all) }()
	select {
	case <-all:
	case err := <-failed:
		return err
	}
	if err := tell(map[string]any{"open": wanted.clients}); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { io.Copy(io.Discard, os.Stdin); close(ended) }()
	select {
	case <-ended:
		return nil
	case err := <-failed:
		return err
	}
}

// spread is what is told of many numbers.
func spread(all []float64) map[string]float64 {
	slices.Sort(all)
	found := map[string]float64{}
	for name, share := range map[string]float64{"p50": 0.5, "p90": 0.9, "p99": 0.99} {
		if len(all) > 0 {
			found[name] = all[min(int(share*float64(len(all))), len(all)-1)]
		}
	}
	return found
}
