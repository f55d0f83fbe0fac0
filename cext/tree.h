/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The node table: what the kernel knows of the union, and where each of it really lies.
 *
 * Words: a *layer* is a directory tree (layer 0 is the upper if there is one). A *real directory*
 * (struct rdir) is one directory of one layer, known by its parent and name, its descriptor
 * cached. A *node* is one inode of the union; an *alias* one of its names. A directory node stacks
 * real directories, the top-most first; any other node has one *home*: the layer and an alias, or
 * an entry of the hard link index.
 *
 * Locking: one mutex, `lock`, protects every field that is not called immutable here. It is never
 * held over a system call that can sleep: callers take references, drop it, call, take it again
 * and verify (a place is verified by the device and inode number found there). Callable from any
 * thread; needs no interpreter. */
#ifndef UNIONFS_TREE_H
#define UNIONFS_TREE_H

#include <pthread.h>
#include <stdatomic.h>

#include "keylock.h"
#include "sys.h"

enum { ROOT_INO = 1, MAX_LAYERS = 500, TEMP_BYTES = 24, LEAVING_BYTES = 4096 };

struct layer {
    int fd;        /* immutable until tree_shut: root directory, the caller's of tree_new */
    dev_t dev;     /* immutable */
    uint16_t fs;   /* immutable: number of its file system among the layers, in inode numbers */
    bool careful;  /* immutable: mount points lie beneath and must not be crossed */
    bool wh_files; /* immutable: .wh.NAME is a whiteout here */
    bool passing;  /* immutable: its files have other numbers at the next mount: no index */
    bool in_fuse;  /* immutable */
    unsigned char uuid[16]; /* immutable: of the file system, zero if not known */
    bool other_uuid;        /* immutable: the index may know its files by the kernel's, too */
    unsigned char kernel_uuid[16]; /* immutable: that */
    struct rdir *root;             /* immutable */
};

struct rdir {
    struct rdir *parent; /* holds a reference; NULL for the root of a layer */
    char *name;
    uint32_t refs;
    uint32_t pins;  /* users of fd just now; a pinned fd is not closed */
    int fd;         /* -1 when not cached */
    uint16_t layer; /* immutable */
    bool sealed;    /* immutable: a mount point in the layer, shown as an empty directory */
    /* Flags: written with the lock held, or before others know it; read without. */
    _Atomic bool impure; /* holds entries that came from a lower layer: their marks are read */
    _Atomic bool impure_marked; /* overlay.impure says so on disk */
    _Atomic bool xwhiteouts;    /* holds zero-size files marked overlay.whiteout */
    bool gone;                  /* removed: its descriptor must not be opened by name again */
    dev_t dev;
    ino_t ino;                  /* what is there, once seen; 0 before */
    struct rdir *newer, *older; /* least-recently-used list of cached descriptors */
};

struct alias {
    struct alias *next; /* of the same node */
    struct alias *hash_next;
    struct node *parent; /* holds a reference */
    struct node *node;
    bool real; /* the name exists in the layer that is the node's home (not only by the index) */
    uint32_t hash;
    char name[];
};

struct file {
    struct file *next; /* of the same node */
    struct node *node; /* holds a reference */
    int fd;
    int flags;
    bool lower; /* fd stands for a lower file: replaced when the node is copied up */
    uint32_t refs;
    struct face *face; /* face.h: while it is counted there */
    enum { OPEN_BY_ITSELF, OPEN_CACHED, OPEN_BACKED } how;
};

struct node {
    struct node *hash_next;
    uint64_t ino; /* immutable */
    uint64_t nlookup;
    uint32_t refs;
    mode_t type;    /* immutable: S_IFMT bits */
    bool upper;     /* lies in the upper */
    bool metacopy;  /* its data lie in a lower layer still */
    bool indexed;   /* home is an entry of the index */
    bool unlinked;  /* has no name any more */
    bool unsure;    /* directory: see dir_unsure() */
    uint16_t layer; /* not a directory: layer of its home */
    uint16_t ndirs;
    uint32_t generation; /* counts changes of place */
    struct rdir **dirs;  /* directory: stack, top-most first */
    struct alias *aliases;
    char *index_name;
    struct rdir *data_dir; /* metacopy: where the data are */
    char *data_name;
    dev_t data_dev;
    ino_t data_ino;
    char *redirect; /* overlay.redirect of the upper part */
    dev_t dev;
    ino_t real_ino;     /* identity of the home */
    int64_t nlink_diff; /* indexed: union's link count less the real one (overlay.nlink) */
    int pin;            /* descriptor held while unlinked but known, else -1 */
    uint32_t leaving;   /* its space in the upper, in LEAVING_BYTES, once it has no name any more */
    struct file *files;
    struct face *faces; /* face.h */
    bool pages_old;     /* the kernel's own pages are older than the data */
    bool given;         /* its pages have been given to the kernel at an open: ahead.h */
    bool mapped;        /* perhaps mapped for writing, which changes times unseen by the kernel */
    bool awaits_writer; /* one was sent away: its lower is not passed through any more */
    uint32_t shelved;   /* shelf.h: its place, from 1; 0: none */
};

struct dirhandle;

/* Which files the kernel reads and writes by itself. */
enum passthrough { PASSTHROUGH_OFF, PASSTHROUGH_AUTO, PASSTHROUGH_ALL };

struct tree {
    pthread_mutex_t lock;
    uint16_t nlayers;     /* immutable */
    struct layer *layers; /* immutable */
    bool has_upper;       /* immutable: layer 0 is the upper */
    bool live;            /* immutable: lower layers change underneath */
    bool static_nlink;    /* immutable: directories have one link */
    bool noxattrs, noacl; /* immutable: not shown, not even asked for */
    bool hide_wh;         /* immutable: .wh. names are the upper's marks, so no layer shows any */
    const char *prefix;   /* immutable: "trusted.overlay." or "user.overlay." */
    bool upper_xattrs;    /* immutable: the upper keeps marks in xattrs */
    int override_mode;    /* immutable: xattr_permissions */
    int64_t squash_uid, squash_gid; /* immutable: -1 for none */
    struct idrange *uids, *gids;    /* immutable */
    uint32_t nuids, ngids;
    struct rdir *index; /* immutable: the index directory, or NULL */
    int numbers_fd;     /* immutable: records of numbers that no xattr can hold, or -1 */
    int image_fd;       /* immutable: what the upper's file system lies in (room.h), or -1 */

    /* For changes that are made here (plain.h). Immutable but for `temps`. */
    bool plain;              /* marks in attributes, devices for whiteouts, owners as on disk */
    bool all_ids;            /* no id is outside our user namespace */
    bool sync_copies;        /* a copy's data are on disk before it is seen */
    bool sync_names;         /* and its name before it is used */
    bool upper_in_fuse;      /* immutable: see ask_anew() */
    bool upper_in_order;     /* immutable: see keeps_order() */
    int work_fd;             /* where a change is prepared, or -1 */
    uint64_t metacopy_bytes; /* from here on data stay below until they are wanted; 0: never */
    uid_t euid;
    gid_t egid;
    _Atomic uint32_t temps;      /* names given to temporaries */
    _Atomic bool metacopy_noted; /* the upper says that there may be metadata-only copies */
    /* One copy-up of an inode at a time; inodes whose names or attributes change; directories whose
     * entries do (union.py). */
    struct keylocks copying, committing, entering;

    struct node *root;
    struct node **nodes; /* by inode number */
    uint64_t node_mask, node_count;
    struct node *dying;   /* out of the table, waiting to be freed; by hash_next */
    struct alias **names; /* by parent and name */
    uint64_t name_mask, name_count;
    struct rdir lru; /* head: lru.newer is the oldest */
    uint32_t open_dirs, max_open_dirs;
    int most_open, most_pinned; /* immutable: spare.h */
    _Atomic int last_open;      /* descriptor that was opened for a file last */
    struct shelved {
        struct node *node; /* NULL: free */
        int fd;
    } * shelf; /* shelf.h */
    uint32_t shelf_size, shelf_next;
    struct file **files; /* handle number - 1 */
    uint32_t nfiles, files_cap, file_hint;
    struct dirhandle **dirhandles;
    uint32_t ndirhandles;
    int closing[64]; /* descriptors to close once the lock is dropped: it may free a large file */
    uint32_t nclosing;
    uint64_t leaving_closed; /* that of nodes whose descriptors are among these */
    /* What all of them have, until it has been closed here; written with the lock held or not. */
    _Atomic uint64_t leaving;
    /* face.h; the first two are set before the engine's threads start */
    int device; /* that passthrough is asked of, or -1 */
    enum passthrough passthrough;
    struct face **faces; /* by number, without FACE_BIT, less 1 */
    uint32_t nfaces;
    _Atomic uint32_t odd_nodes; /* nodes with several faces, or perhaps mapped */
    struct {
        uint32_t thread;
        uint64_t id;
    } sent[16]; /* who has been told ESTALE of what */
    uint32_t nsent;
    pthread_rwlock_t leasing; /* above `lock`; read: a file is being opened for writing */
    _Atomic uint64_t opened_backed, opened_anew; /* for the status */
    _Atomic int refused;                         /* why a file was not passed through: errno */
    char warning[512];                           /* the newest complaint about what lies on disk */
    struct stat root_seen;                       /* its attributes; st_ino 0: not yet */
};

struct idrange {
    uint32_t inside, outside, length;
};

struct tree_options {
    bool has_upper, live, upper_xattrs, static_nlink, noxattrs, noacl;
    bool user_prefix; /* user.overlay.* instead of trusted.overlay.* */
    int override_mode;
    int64_t squash_uid, squash_gid;
    const struct idrange *uids, *gids;
    uint32_t nuids, ngids;
    uint32_t max_open_dirs;
    int index_fd;   /* -1: none */
    int numbers_fd; /* -1: none */
    int image_fd;   /* -1: none */
    int work_fd;    /* -1: none */
    bool plain, all_ids, sync_copies, sync_names;
    uint64_t metacopy_bytes;
};

/* `layers` and their descriptors are the caller's and outlive the tree. */
errint_t tree_new(const struct layer *layers, uint16_t nlayers, const struct tree_options *options,
                  struct tree **ret_tree);
/* Closes what it has opened in the layers, and knows nothing of what it was given any more. The
 * threads that use it have ended; a call that comes all the same fails. Twice does nothing. */
void tree_shut(struct tree *t);
void tree_free(struct tree *t);
void tree_warn(struct tree *t, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Nodes. Those that end in _locked want the lock held. */
struct node *node_find_locked(struct tree *t, uint64_t ino);
uint64_t tree_nodes(struct tree *t);                 /* how many it knows */
struct node *node_get(struct tree *t, uint64_t ino); /* NULL if not known; put it back */
void node_put(struct tree *t, struct node *n);
void node_put_locked(struct tree *t, struct node *n);
void closing_add_locked(struct tree *t, int fd);
/* Drops the lock and closes what has come together. */
void unlock_and_close(struct tree *t);
struct node *node_new_locked(struct tree *t, uint64_t ino, mode_t type);
/* The number of a regular file that the kernel knows, from some place of the table on; 0 if none
 * was met soon. */
uint64_t some_known_file(struct tree *t, uint64_t from);
void node_forget(struct tree *t, uint64_t ino, uint64_t nlookup);
struct alias *alias_find_locked(struct tree *t, struct node *parent, const char *name);
errint_t alias_add_locked(struct tree *t, struct node *parent, const char *name, struct node *n,
                          bool real);
void alias_drop_locked(struct tree *t, struct alias *a);
/* A name of the node: one that is real in its layer, if there is one; NULL if it has none. */
struct alias *alias_best_locked(const struct node *n);
/* The node that the table knows by a name, or NULL; put it back. */
struct node *node_of_name(struct tree *t, uint64_t parent, const char *name);
/* The real directory of a stack that lies in `layer`, or NULL. */
struct rdir *node_dir_locked(const struct node *n, uint16_t layer);

/* Real directories. */
struct rdir *rdir_new(uint16_t layer, struct rdir *parent,
                      const char *name); /* takes a ref of parent */
void rdir_ref_locked(struct rdir *r);
void rdir_put_locked(struct tree *t, struct rdir *r);
void rdir_put(struct tree *t, struct rdir *r);
/* Descriptor (O_PATH) of a directory, kept open until rdir_unpin; or -errno. */
int rdir_pin(struct tree *t, struct rdir *r);
/* Where no descriptor is to be had: closes those of the directories that nobody uses just now.
 * Whether there were any. */
bool rdirs_release(struct tree *t);
/* Closes what is cached; from here on nothing is kept open. */
void rdirs_close_locked(struct tree *t);
void rdir_unpin(struct tree *t, struct rdir *r);
/* The upper part of a directory node, referenced and pinned until upper_unpin: its descriptor;
 * -ENOENT where it has none. */
int upper_pin(struct tree *t, struct node *n, struct rdir **ret_dir);
void upper_unpin(struct tree *t, struct rdir *dir);
/* A name for a temporary in the work directory, as kernel overlayfs names its own. */
void temp_name(struct tree *t, char name[static TEMP_BYTES]);

/* Where a node is: a directory to pin, the name in it, what must be found there. */
struct place {
    struct rdir
        *dir; /* holds a reference; NULL: the node is a pinned descriptor or a layer's root */
    int fd;   /* own duplicate, if dir is NULL; else -1 */
    uint16_t layer;
    bool careful;
    dev_t dev;
    ino_t ino;
    uint32_t generation;
    char name[NAME_BYTES];
};

/* `data`: where the bytes of a regular file are (the lower file of a metadata-only copy). */
errint_t node_place(struct tree *t, struct node *n, bool data, struct place *ret_place);
void place_done(struct tree *t, struct place *p);

/* Opens a node at its place, verified; or -errno. */
int node_open(struct tree *t, struct node *n, int flags, bool data);
/* The same, and what it is. */
int node_open_stat(struct tree *t, struct node *n, int flags, bool data, struct stat *ret_st);
errint_t node_stat(struct tree *t, struct node *n, struct stat *ret_st);
/* Calls fn with a /proc path of the node, for the calls that know paths only. */
errint_t node_with_path(struct tree *t, struct node *n,
                        errint_t (*fn)(const char *path, bool nofollow, void *arg), void *arg);

/* What is said of an inode: numbers, link count, owner as the union shows them. */
errint_t node_attr(struct tree *t, struct node *n, struct stat *ret_st);
/* When it was made (birth.c), in nanoseconds; 0 where the layer's file system does not know. */
errint_t node_birth(struct tree *t, struct node *n, int64_t *ret_birth);
void override_stat(int mode, const char *path, bool nofollow, struct stat *st);
void attr_show(struct tree *t, const char *path, bool nofollow, struct stat *st);

/* Where a symbolic link points: its length, not terminated; or -errno. */
ssize_t tree_readlink(struct tree *t, uint64_t ino, char *target, size_t size);

/* The number of what the kernel has been told of, by that name or another, and knows still; or 0.
 */
uint64_t tree_known(struct tree *t, uint64_t parent, const char *name);

/* Lookup (resolve.c): the attributes as the union shows them, the lookup count raised by one. */
errint_t tree_lookup(struct tree *t, uint64_t parent, const char *name, struct stat *ret_st);

/* The same of a file that has just been made in the upper, and is open. */
errint_t tree_lookup_made(struct tree *t, uint64_t parent, const char *name, int fd,
                          struct stat *ret_st);

enum upper_state { UPPER_NONE, UPPER_WHITEOUT, UPPER_ENTRY };
struct entry {
    uint64_t ino; /* 0: no such name in the union */
    mode_t type;
    enum upper_state upper;
    bool lower; /* a lower layer would show something here, were the upper's entry away */
};
errint_t tree_entry(struct tree *t, uint64_t parent, const char *name, struct entry *ret_entry);

/* What overlay.origin and the hard link index say of a lower file: kernel overlayfs's struct ovl_fb
 * (its file handle), and the index's name for it, which is that in hexadecimal. Where the lower has
 * no file handles, `len` is 0 and the name is one of our own; empty where there is no index. */
struct origin {
    unsigned char fb[120];
    size_t len;
    char hex[NAME_BYTES];
};
errint_t origin_at(struct tree *t, uint16_t layer, int dirfd, const char *name,
                   struct origin *ret_origin);
errint_t origin_of(struct tree *t, uint64_t ino, struct origin *ret_origin);
/* Whether a copy of a file of `layer` with so many links is in the index. */
bool goes_to_index(const struct tree *t, uint16_t layer, nlink_t links);

/* Has the kernel ask a file system in user space for the attributes of what mkdir(2) or link(2) has
 * just made in the upper: what those were answered with need not be right (gocryptfs 2.3), and is
 * kept a while. Does nothing in others. */
void ask_anew(const struct tree *t, int dirfd, const char *name);

/* Sets overlay.MARK of what a descriptor, perhaps O_PATH, stands for. */
errint_t set_mark(struct tree *t, int fd, const char *mark, const void *value, size_t len);
/* Writes on a copy where it came from: its number in the union, and the origin of `src`, a
 * descriptor of the lower file (any; so is `copy`). `ret_kept`: false where the copy can hold no
 * such marks (a user's symbolic links and special files: xattr(7)). */
errint_t mark_origin(struct tree *t, struct node *n, int src, int copy, bool *ret_kept);

/* Told after a change has been committed to disk (change.c). */
struct copied_up {
    uint64_t ino;
    uint64_t parent; /* the alias it was published at; 0: an orphan, unlinked meanwhile */
    const char *name;
    bool metacopy;
    const char *index_name; /* or NULL */
    int64_t nlink_diff;
    int orphan_fd;
};
errint_t tree_copied_up(struct tree *t, const struct copied_up *c);
errint_t tree_data_copied(struct tree *t, uint64_t ino);
/* Holds what is about to lose a name, if the kernel knows it; abandon if the change failed. */
errint_t tree_prepare_unlink(struct tree *t, uint64_t parent, const char *name);
void tree_abandon_unlink(struct tree *t, uint64_t parent, const char *name);
errint_t tree_unlinked(struct tree *t, uint64_t parent, const char *name);
errint_t tree_renamed(struct tree *t, uint64_t parent, const char *name, uint64_t new_parent,
                      const char *new_name, bool exchange);
errint_t tree_made_opaque(struct tree *t, uint64_t ino);
errint_t tree_alias_made_real(struct tree *t, uint64_t parent, const char *name);
void tree_set_nlink_diff(struct tree *t, uint64_t ino, int64_t diff);
/* Marks an upper directory impure, on disk and in the table, if it is not yet. */
errint_t tree_make_impure(struct tree *t, uint64_t ino);
errint_t tree_set_redirect(struct tree *t, uint64_t ino, const char *redirect);
errint_t tree_redirect_path(struct tree *t, uint64_t ino, char **ret_path);
/* O_TMPFILE (nameless.c): a regular file of the upper without a name, `fd` stays the caller's. The
 * attributes as the union shows them, the lookup count raised by one. */
errint_t tree_made_nameless(struct tree *t, int fd, struct stat *ret_st);
/* It has got its first name. */
void tree_named(struct tree *t, uint64_t ino);

/* Open files (io.c). A handle is a number >= 1. */
errint_t file_open(struct tree *t, uint64_t ino, int flags, uint64_t *ret_fh);
errint_t file_adopt(struct tree *t, uint64_t ino, int fd, int flags, uint64_t *ret_fh);
struct file *file_get(struct tree *t, uint64_t fh);
/* The same; with handle 0, where the kernel opens files by itself, one for the moment, to read. */
errint_t file_of(struct tree *t, uint64_t ino, uint64_t fh, struct file **ret_file);
void file_put(struct tree *t, struct file *f);
void file_release(struct tree *t, uint64_t fh);
errint_t file_switch_to_upper(struct tree *t, struct node *n);
/* As many bytes as there are, up to `size`; or -errno, if there are none. `nowait`: -EAGAIN rather
 * than wait for a disk. */
ssize_t file_read(const struct file *f, char *buf, size_t size, off_t offset, bool nowait);
/* `mapped`: what was stored through a mapping, which costs the file no set-ID bits. */
ssize_t file_write(struct tree *t, uint64_t fh, const char *buf, size_t size, off_t offset,
                   bool mapped);
errint_t file_sync(struct tree *t, uint64_t fh, bool datasync);

/* Directories (readdir.c). */
/* `ret_keep`: its offsets mean the same in every handle, so that a listing may be kept. */
errint_t dir_open(struct tree *t, uint64_t ino, uint64_t *ret_dh, bool *ret_keep);
/* Its listing was given out with a number that stands for nothing: none is to be kept from now on,
 * since who lists it again may be told the right one. */
void dir_unsure(struct tree *t, uint64_t ino);
void dir_release(struct tree *t, uint64_t dh);
struct dirent_out {
    const char *name;
    unsigned char type;
    uint64_t next; /* offset to go on from */
};
/* Calls fn for the entries from `offset` on until it returns non-zero. */
errint_t dir_read(struct tree *t, uint64_t dh, uint64_t offset,
                  int (*fn)(void *arg, const struct dirent_out *entry), void *arg);
uint64_t dir_ino(struct tree *t, uint64_t dh);
/* Of what ".." is: its own where it has no parent, as the root or when it was removed. */
uint64_t dir_parent(struct tree *t, uint64_t dh);
errint_t dir_is_empty(struct tree *t, uint64_t ino, bool *ret_empty);
void dirhandles_free(struct tree *t);

/* resolve.c, for readdir.c and copy: is what was found there a whiteout? */
bool is_whiteout(struct tree *t, struct rdir *dir, int dirfd, const char *name,
                 const struct stat *st);

#endif
