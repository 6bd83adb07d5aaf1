/* Sockets with deadlines, and the door by which a rank comes in to another: the listener says who it is, then the guest does. What is silent or talks
 * otherwise is a stranger and delays nobody. Inside dist/ only. Deadlines are in seconds_now(). */
#ifndef LLMC_DIST_DOOR_H
#define LLMC_DIST_DOOR_H
#include "../base/error.h"
#include <stdint.h>
#include <sys/socket.h>

enum { DOOR_VERSION = 1, PROOF_MOST = 1 << 20 /* bytes */, ADDRESS_ROOM = 48 };
#define DOOR_MAGIC 0x6c6c6d633a726b30u /* in the byte order of the machine: another order is another magic */

/* Magic, version and rank stand at the same place in every version. */
typedef struct { uint64_t magic; int32_t version, rank; uint64_t nonce /* of the job: random, never 0 */; } Banner;
typedef struct {
    uint64_t magic;
    int32_t version, rank;
    uint64_t nonce;
    int32_t size, port;                /* of all ranks; where this one listens itself */
    int32_t proof_bytes;               /* follow */
    uint32_t left_ms;                  /* how long it waits for an answer */
} Hello;

typedef struct { struct sockaddr_storage at; socklen_t bytes; } Endpoint;
bool endpoint_numeric(const char *address, int port, Endpoint *out);   /* false where it is no numeric address */
/* Of a connected socket, its own or the peer's, as text; IPv4 within IPv6 as IPv4. */
void address_of(int fd, bool peer, char out[ADDRESS_ROOM]);
bool is_loopback(const char *address);

/* A listening socket; at NULL: on all addresses. port 0 takes a free one. *port: which. -1 with errno. */
int listen_on(const char *address, int *port);
/* Everything, until the deadline. false with errno (ETIMEDOUT; ECONNRESET where the peer is gone). */
bool send_all(int fd, const void *data, size_t bytes, double deadline);
bool recv_all(int fd, void *data, size_t bytes, double deadline);

/* Connects and reads the banner. nonce 0: any. -1 with *why where there is no such rank. The version may be another: the caller looks. */
int door_enter(const Endpoint *to, int rank, uint64_t nonce, double deadline, Banner *banner, const char **why);

typedef struct { int fd; size_t have; Hello hello; char *proof; /* NUL-terminated */ } Guest;
typedef struct {
    int listener;
    Banner banner;
    Guest *guests;                     /* that have not said who they are; the oldest is dropped where there are too many */
    size_t n, most;
    int strangers;                     /* how many were sent away */
} Door;
typedef enum { DOOR_CAME, DOOR_WATCHED, DOOR_LATE } DoorEvent;
void door_open(Door *d, int listener, int rank, uint64_t nonce, int size);
/* Waits for the next guest, who is the caller's from then on (*came; fd, proof), for a watched socket to be readable or closed (*which), or for the
 * deadline. A guest of another version has only magic, version and rank. */
DoorEvent door_wait(Door *d, const int *watched, size_t n_watched, double deadline, Guest *came, size_t *which);
void door_close(Door *d);
#endif
