// Package adminpb is the wire form of package admin, generated from admin.proto.
package adminpb
