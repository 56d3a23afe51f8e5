// Command consensus measures the consensus of this project beside other
// libraries: five replicas of each, every replica a process of its own with its
// own directory and real flushes, driven by closed-loop proposers in the process
// of the leader. An operation ends when its entry is chosen and delivered in
// order there: effective (quorate), applied (etcd raft), or its future answered
// (hashicorp raft).
//
// It is a module of its own, so that nothing it measures beside the project
// becomes a dependency of the project.
//
// One binary is both sides: started with nodeEnv set it is a replica, which
// takes commands as lines of JSON on its standard input and answers each with
// one on its standard output; otherwise it starts the replicas, has the
// contenders take turns (A B A B …) and prints tables, notes and, last, one line
// a figure.
//
// How the contenders are set up is told beside their code, in quorate.go,
// etcd.go and hashicorp.go.
package main
