/// A chat in the terminal: `swift run chat`, or `swift run chat http://127.0.0.1:9000`. Ctrl-D leaves.

import Foundation
import TinyQmoeClient

let address = CommandLine.arguments.dropFirst().first ?? "http://127.0.0.1:8080"
guard let server = URL(string: address), server.host != nil else {
    FileHandle.standardError.write(Data("error: \(address) should be the address of a server\n".utf8))
    exit(2)
}
let client = Client(server: server)
var messages: [Message] = []

while true {
    print("> ", terminator: "")
    fflush(stdout)
    guard let line = readLine() else { break }
    if line.isEmpty { continue }
    let question = Message(role: "user", content: line)
    var text = ""
    do {
        for try await piece in client.answer(to: messages + [question]) {
            print(piece, terminator: "")
            fflush(stdout)
            text += piece
        }
        messages += [question, Message(role: "assistant", content: text)]
        print()
    } catch {
        FileHandle.standardError.write(Data("\nerror: \(error.localizedDescription)\n".utf8))
    }
}
print()
